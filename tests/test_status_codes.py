import pytest
from hypothesis import given
from hypothesis import strategies as st

from openmeter_wsgi import StatusCodes


@pytest.mark.parametrize(
    ("codes", "text"),
    [
        ("200-299", "200-299"),
        ("200, 201, 300-304", "200-201,300-304"),
        ("200-299,304", "200-299,304"),
        ("200 - 204", "200-204"),
        ([200, 201, "202-204"], "200-204"),
        ({418}, "418"),
        ("2xx", "200-299"),
        ("2XX, 404", "200-299,404"),
        ("100-599", "100-599"),
        (StatusCodes("204"), "204"),
    ],
)
def test_codes_are_read_and_said_shortly(codes: object, text: str) -> None:
    assert StatusCodes(codes).text == text  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("codes", "named"),
    [
        ("*", "write '200-599'"),
        ("299-200", "'299-200'"),
        ("200-", "'200-'"),
        ("-299", "'-299'"),
        ("", "''"),
        ([], "[]"),
        ("200,,201", "''"),
        ("99", "'99'"),
        ("099-200", "'099-200'"),
        ("600", "'600'"),
        ("500-600", "'500-600'"),
        ("6xx", "'6xx'"),
        ("0xx", "'0xx'"),
        ("20O", "'20O'"),
        ("٢٠٠", "'٢٠٠'"),
        ([200.0], "200.0"),
        ([True], "True"),
        (200, "200"),
        (None, "None"),
        (b"200", "b'200'"),
        ([200, None], "None"),
    ],
)
def test_what_is_no_code_is_refused_by_name(codes: object, named: str) -> None:
    with pytest.raises(ValueError, match=r".") as refused:
        StatusCodes(codes)  # type: ignore[arg-type]

    assert named in str(refused.value)


@given(st.sets(st.integers(100, 599), min_size=1))
def test_the_short_text_means_the_same_codes(codes: set[int]) -> None:
    read = StatusCodes(codes)

    assert {int(code) for code in read.codes} == codes
    assert StatusCodes(read.text) == read
    assert hash(StatusCodes(read.text)) == hash(read)
    assert all(str(code) in read for code in codes)
