"""What a run could leave behind on a model."""


def hooks_of(module):
    """Every hook of every layer, and whether its forward was replaced."""
    return [
        (
            list(submodule._forward_hooks.values()),  # noqa: SLF001 - torch lists them nowhere else
            list(submodule._forward_pre_hooks.values()),  # noqa: SLF001 - likewise
            "forward" in vars(submodule),
        )
        for submodule in module.modules()
    ]


def weights_of(module):
    """A copy of every weight and buffer."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}
