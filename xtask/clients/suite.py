"""What the suites of clients have in common: checks that are counted, and servers' addresses from the command line."""

import argparse
import sys
import traceback

CHECKS = []


def check(function):
    """A check: it raises when something is not as it should be."""
    CHECKS.append(function)
    return function


def run(name, *arguments):
    """Runs all checks with the servers' addresses and ends the program: 0 if all passed."""
    parser = argparse.ArgumentParser()
    for argument in arguments:
        parser.add_argument("--" + argument, required=True)
    options = parser.parse_args()
    failed = 0
    for function in CHECKS:
        try:
            function(options)
        except Exception:
            failed += 1
            print(f"FAILED {function.__name__}", file=sys.stderr)
            traceback.print_exc()
    print(f"{name}: {len(CHECKS) - failed} of {len(CHECKS)} checks passed")
    sys.exit(1 if failed else 0)


def raises(kind, status, call):
    """The error of a call that must fail with this class and status."""
    try:
        call()
    except kind as error:
        assert error.status_code == status, error
        return error
    raise AssertionError(f"expected {kind.__name__}, the call went through")


WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Seoul", "Paris"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


def follows(value):
    """The value follows WEATHER."""
    assert list(value) == ["city", "days"], value
    assert value["city"] in ("Seoul", "Paris") and 1 <= value["days"] <= 9, value
