"""The commands that cli.py registers: what each option means, what is printed. One file a command or group of commands.

Every file here may use all of the project, and nothing outside but cli.py uses them. Importing them costs no torch: what a
command needs is imported when it runs, so that `seqlab --help` answers at once.
"""
