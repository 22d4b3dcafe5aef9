"""Measurements take minutes each and some need root, so they run only where they are asked for."""


def pytest_collection_modifyitems(config, items):
    """Deselect what is marked `chaos` unless `-m` names the marker."""
    if "chaos" in config.option.markexpr:
        return
    chosen = [item for item in items if item.get_closest_marker("chaos") is None]
    if len(chosen) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
        items[:] = chosen
