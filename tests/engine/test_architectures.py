"""The table of architectures against the installed transformers."""

import re
from importlib.metadata import version

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from serve_app.checkpoint.architectures import HYBRID, LAYER_TYPES, MADE_FOR, RUNS

TEXT = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
# Encoders that can be made to predict tokens; none is published so.
ENCODERS = {"bert-generation", *modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES}


def runs(kind):
    """Return what `engine/loading.py` would say of an architecture's class and its defaults."""
    name = TEXT[kind]
    model = getattr(transformers, name if isinstance(name, str) else name[0])
    if not model._supports_attention_backend or model._is_stateful:
        return False
    try:
        config = CONFIG_MAPPING[kind]()
    except (ValueError, StrictDataclassError):  # it takes parts that have no defaults
        return False
    if config.sub_configs:  # images, audio, or configs of parts
        return False
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ())
    return not text.is_encoder_decoder and kinds <= LAYER_TYPES


def test_architectures_are_the_installed_librarys():
    """An update of transformers is an update of `checkpoint/architectures.py`."""
    installed = tuple(map(int, re.findall(r"\d+", version("transformers"))[:2]))
    assert installed == MADE_FOR
    found = {kind for kind in TEXT if runs(kind)} - ENCODERS - HYBRID
    assert found - RUNS == set()
    assert RUNS - found == set()
    assert set(TEXT) >= HYBRID
