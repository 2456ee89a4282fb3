from seqlab.ops.dispatch import Request


def unavailable(request: Request | None = None) -> str | None:
    return "not written yet"
