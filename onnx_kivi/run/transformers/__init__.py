"""A rewritten model as transformers sees one of its own: the only room that imports transformers and torch.

Whether they are here, and which version of their protocol they speak, is settled before anything else is imported.
"""

from .protocol import PROTOCOL as PROTOCOL
