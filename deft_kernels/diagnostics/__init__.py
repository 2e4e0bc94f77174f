"""What the gate does to a model's tokens: a recorder, and figures and a report from it.

    recorder = Recorder()                               # once
    recorder.add(stats, labels)                         # each step, with the statistics that the loss made
    recorder.save("run.npz")                            # at the end; Recording.load("run.npz") reads it

The module `figures` draws; it needs matplotlib, and the report also tqdm: the extra `diagnostics`. The rest
needs neither.
"""

from .gates import DEFAULT as OBJECTIVES
from .gates import gradient_norm
from .recorder import Recorder
from .recording import Recording

__all__ = ["OBJECTIVES", "Recorder", "Recording", "gradient_norm"]
