"""See docs/architecture.md. Imported as qcompiler.passes only."""

if __name__ != "qcompiler.passes":
    raise ImportError("import this package as qcompiler.passes, not as passes")
