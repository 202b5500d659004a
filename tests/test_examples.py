"""The examples do what they say."""

from pathlib import Path

from tests.processes import succeeded, torchrun

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name, *arguments, start=()):
    return succeeded(*start, EXAMPLES / name, *arguments, timeout=300, TRANSFORMERS_VERBOSITY="error").out


def test_property_test_your_loss_finds_the_bug():
    printed = run("property_test_your_loss.py")
    assert "wrong: check_row_additive: the loss is not a sum over the rows." in printed
    assert "split           row 0 | row 1" in printed  # two rows, cut in two: nothing smaller breaks it
    assert "normalized by something" in printed and "`tfn.Mean.of(values, w)`" in printed
    assert printed.endswith("right: holds\n")


def test_laws_on_peers():
    lines = run("laws_on_peers.py", "trainfn", "BERT classes").splitlines()
    assert lines[1].split() == ["trainfn", "holds", "holds"]
    assert "FAILS  8 x 1 rows: step 8.00 x as long" in lines[2]


def test_ranks_print_what_one_process_prints(tmp_path):
    """The second half on two processes, each with half of the state, from the checkpoint that one process left."""
    one = run("ranks.py", "--steps", "20", "--save", str(tmp_path / "one")).splitlines()
    run("ranks.py", "--steps", "10", "--save", str(tmp_path / "two"))
    two = run(
        "ranks.py", "--steps", "20", "--zero", "3", "--save", str(tmp_path / "two"), start=torchrun(2)
    ).splitlines()
    assert one[-1] == two[-1] and one[-1].startswith("held out: loss ")
    held = [int(printed[-2].split(", ", 1)[1].split()[0].replace(",", "")) for printed in (one, two)]
    assert held[1] < 0.6 * held[0]
