"""The command line of zods.finetune: where the configuration is named."""

import pytest

from zods.arguments import parse_arguments

NEEDED = ["--model", "m", "--output_dir", "o", "--train_file", "t"]


@pytest.mark.parametrize(
    "options",
    [
        ["--deepspeed_config", "c.json"],
        ["--deepspeed", "c.json"],
        ["--deepspeed", "--deepspeed_config", "c.json"],
        ["--deepspeed_config", "c.json", "--deepspeed"],
        ["--deepspeed", "c.json", "--deepspeed_config", "c.json"],
        ["--local_rank=1", "--deepspeed", "c.json"],
        ["--local_rank", "0", "--deepspeed", "c.json"],
    ],
)
def test_the_configuration_is_named_as_scripts_for_deepspeed_name_it(options):
    assert parse_arguments([*options, *NEEDED]).deepspeed_config == "c.json"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "required: --deepspeed_config"),
        (["--deepspeed"], "required: --deepspeed_config"),
        (["--deepspeed", "a.json", "--deepspeed_config", "b.json"], "give one of the two"),
    ],
)
def test_a_command_without_a_configuration_or_with_two_is_refused(options, said, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_arguments([*options, *NEEDED])
    assert caught.value.code == 2
    assert said in capsys.readouterr().err
