"""stub until merged"""

import torch


def strip(*parts):
    return torch.cat([torch.cat(list(p.cpu()), 2) for p in parts], 1)
