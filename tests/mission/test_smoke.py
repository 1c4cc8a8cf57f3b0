import pytest
from realbox import RealBox

pytestmark = pytest.mark.real


def test_a_bare_append_becomes_a_delivered_result(box: RealBox) -> None:
    box.append({"task": "hello", "prompt": "echo hi"})
    result = box.result("hello")
    assert result["status"] == "success"
    assert result["stdout_tail"] == "hi\n"
    assert result["pulled"] is False
