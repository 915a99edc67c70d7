"""One thread: on shared cores the many small operations of these tests lose more to waiting than they gain from a second."""

import torch

torch.set_num_threads(1)
