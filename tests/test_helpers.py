"""What the tests themselves stand on: what "equal" means, and many cases in one test."""

from __future__ import annotations

import numpy as np
import pytest
from cases import one_test, refuses
from equal import assert_close, assert_same, close, same


def test_equal_is_exact_or_relative_to_the_largest_entry():
    a = np.array([1.0, 100.0], np.float32)
    assert same({"a": [a, None]}, {"a": [a.copy(), None]})
    assert same([np.nan], [np.nan])
    assert not same(a, a.astype(np.float64))
    assert not same(a, a + np.float32(1e-5))
    assert not same(a, a[:1])
    assert not close(a, a[:1])
    assert not same({"a": a}, {"b": a})
    assert not same([a], [a, a])
    assert not same(None, a)
    assert close(a, a.astype(np.float64) + 9e-4)
    assert not close(a, a + 2e-3)
    assert not close(a, np.array([1, np.nan]))
    with pytest.raises(AssertionError, match=r"(?s)twice.*x\.y: .*shape.*z\[1\]: .*absolute=1.0"):
        assert_same({"x": {"y": a}, "z": [a, a]}, {"x": {"y": a[:1]}, "z": [a, a + 1]}, "twice")
    with pytest.raises(AssertionError, match=r"allowed 1\.00e-09"):
        assert_close(a, a + np.float32(1e-3), 1e-9)


def test_every_case_of_one_test_runs_and_all_failures_are_told(tmp_path, monkeypatch):
    seen = []

    @one_test
    @pytest.mark.parametrize(("a", "b"), [(1, 2), pytest.param(3, 4, id="late")])
    @pytest.mark.parametrize("c", [5, 6], ids="c{}".format)
    def cases(a, b, c, tmp_path, monkeypatch):
        assert list(tmp_path.iterdir()) == []
        (tmp_path / "file").touch()
        monkeypatch.setattr(np, "case", c, raising=False)
        seen.append((a, b, c))
        assert c != 6
        if a == 3:
            pytest.fail("third")

    message = r"(?s)3 of 4.*\[c5-late\] .*third.*\[c6-1-2\].*assert 6 != 6.*\[c6-late\]"
    with pytest.raises(AssertionError, match=message):
        cases(tmp_path=tmp_path, monkeypatch=monkeypatch)
    assert len(set(seen)) == 4
    assert not hasattr(np, "case")


def test_a_case_that_skips_itself_fails():
    @one_test
    @pytest.mark.parametrize("a", [1, 2])
    def cases(a):
        if a == 1:
            pytest.skip("not here")

    with pytest.raises(AssertionError, match=r"1 of 2 cases.*\n\n\[1\].*not here"):
        cases()
    with pytest.raises(TypeError, match="no cases"):
        one_test(lambda: None)


def test_each_case_has_to_be_refused_in_its_own_words():
    cases = [("a", ValueError, "literal"), ("b", TypeError, "literal"), ("1", ValueError, "digit")]
    refuses(int, cases[0])()
    message = r"(?s)2 of 3.*\['b'\].*ValueError.*\['1'\].*DID NOT RAISE"
    with pytest.raises(AssertionError, match=message):
        refuses(int, *cases)()
