"""The table in `meshnode.errors` is what the shell sees."""

import errno
import re

from meshnode import errors


def test_every_error_has_the_exit_code_its_table_promises() -> None:
    rows = re.findall(r"^(\d) +`(\w+)`", errors.__doc__ or "", re.MULTILINE)
    table = {name: int(code) for code, name in rows}
    assert table == {name: getattr(errors, name).exit_code for name in table}
    assert sorted(table.values()) == list(range(1, 9))


def test_no_error_has_a_code_outside_the_table() -> None:
    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    assert {value.exit_code for value in classes if issubclass(value, errors.MeshError)} == set(
        range(1, 9)
    )


def test_an_error_is_its_sentence() -> None:
    assert str(errors.ModelError("no such file: give another")) == "no such file: give another"


def test_a_lack_of_file_descriptors_is_found_behind_an_error() -> None:
    assert errors.out_of_files(ValueError()) is None
    assert errors.out_of_files(OSError(errno.ENOSPC, "full")) is None
    assert errors.out_of_files(OSError(errno.ENFILE, "too many")) is not None
    try:
        try:
            raise OSError(errno.EMFILE, "too many")
        except OSError as error:
            raise errors.MeshError("the file cannot be read") from error
    except errors.MeshError as error:
        found = errors.out_of_files(error)
    assert found is not None
    assert "ulimit -n" in str(found)
    assert found.exit_code == 7


def test_errors_that_are_behind_each_other_are_looked_through_once() -> None:
    """A task that fails while another's error passes leaves such a circle."""
    one, other = errors.DiskFull("no space left"), ValueError()
    one.__context__, other.__context__ = other, one
    assert errors.out_of_files(one) is None
