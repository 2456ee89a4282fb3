"""seqlab: Mamba models on DNA and raw audio at million-token context.

Importing this costs torch alone: no device is touched, nothing is compiled, no logging is set up.
"""

__version__ = "0.1.0"
