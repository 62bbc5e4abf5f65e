import pytest

from fastattn.lm import load
from fastattn.lm.loading.loaded import end_tokens


@pytest.mark.parametrize("found, expected", [(None, set()), (7, {7}), ([7, 9], {7, 9})])
def test_end_tokens(found, expected):
    tiny = load("tiny", attn="eager", device="cpu")
    tiny.model.generation_config.eos_token_id = found
    assert end_tokens(tiny) == expected
