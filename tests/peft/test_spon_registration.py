# SPDX-License-Identifier: Apache-2.0
import copy
import enum
import pickle
import subprocess
import sys

import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.peft_types import PeftType

from spon_peft import SponConfig, SponModel, register
from spon_peft.registration import add_member


def test_member_is_like_the_others():
    member = PeftType.SPON
    assert member is PeftType("SPON") is PeftType["SPON"]
    assert isinstance(member, PeftType) and member == "SPON" and member.name == member.value == "SPON"
    assert member in list(PeftType) and "SPON" in PeftType.__members__
    assert pickle.loads(pickle.dumps(member)) is member and copy.deepcopy(member) is member


def test_tables():
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.SPON] is SponConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.SPON] is SponModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.SPON] == "spon_"


def test_registering_again_changes_nothing():
    from peft import PeftConfig

    before, reader = list(PeftType), PeftConfig.from_pretrained
    register()
    assert list(PeftType) == before
    assert PeftConfig.from_pretrained.__func__ is reader.__func__


def test_configs_of_other_methods_are_read_as_without_us(tmp_path):
    from peft import LoraConfig

    LoraConfig(r=3).save_pretrained(tmp_path)
    assert LoraConfig.from_pretrained(pretrained_model_name_or_path=str(tmp_path)).r == 3


def test_another_package_in_our_place_is_an_error(monkeypatch):
    monkeypatch.setitem(PEFT_TYPE_TO_TUNER_MAPPING, PeftType.SPON, object)
    with pytest.raises(RuntimeError, match="registered"):
        register()


def test_member_can_be_added_to_any_string_enumeration():
    class Color(str, enum.Enum):
        RED = "red"

    blue = add_member(Color, "BLUE", "blue")
    assert Color.BLUE is blue is Color("blue") and [c.name for c in Color] == ["RED", "BLUE"]
    assert add_member(Color, "BLUE", "blue") is blue


def test_importing_the_package_leaves_the_trainer_unimported():
    code = (
        "import sys, spon_peft; assert 'transformers.trainer' not in sys.modules; "
        "assert 'spon_peft.trainer' not in sys.modules; spon_peft.SponTrainer"
    )
    environment = {"PYTHONPATH": ":".join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_importing_spon_transformers_imports_no_host():
    code = "import sys, spon_transformers; assert not {'torch', 'transformers'} & sys.modules.keys()"
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path), "SPON_AUTOLOAD": "0"}
    )


def test_unknown_attribute():
    import spon_peft

    with pytest.raises(AttributeError, match="Nothing"):
        spon_peft.Nothing  # noqa: B018
