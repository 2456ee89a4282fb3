"""`seqlab doctor`: what works here."""

import typer
from rich.console import Console
from rich.markup import escape

from tasks.commands.options import Json
from tasks.commands.terminal import emit, note


def doctor(json_out: Json = None) -> None:
    """What works here and why not: versions, devices, memory, every operator back end checked against the reference.

    Example:  seqlab doctor
    """
    import dataclasses

    from seqlab.doctor import examine

    findings = examine()
    problems = [finding for finding in findings if finding.status == "problem"]

    def human() -> None:
        console = Console(highlight=False, soft_wrap=True)
        marks = {"ok": "[green]ok     [/]", "absent": "[dim]absent [/]", "problem": "[bold red]PROBLEM[/]"}
        section = None
        for finding in findings:
            if finding.section != section:
                section = finding.section
                console.print(f"\n[bold]{section}[/]")
            console.print(f"  {marks[finding.status]} {finding.name:<19} {escape(finding.detail)}")
            if finding.remedy:
                console.print(f"          {'':<19} remedy: {escape(finding.remedy)}")
        console.print()
        note("All is well." if not problems else f"{len(problems)} problem(s); the remedies are above.")

    data = {"problems": len(problems), "findings": [dataclasses.asdict(finding) for finding in findings]}
    emit(json_out, data, human=human)
    if problems:
        raise typer.Exit(1)
