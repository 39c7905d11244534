"""Does a pair keep the promise on this machine? Equal text, with every difference explained; under rejection the
target's own distribution, with the power of the test. `docs/exactness.md` says what is promised."""
