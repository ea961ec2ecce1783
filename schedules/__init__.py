"""See docs/architecture.md. Imported as qcompiler.schedules only."""

if __name__ != "qcompiler.schedules":
    raise ImportError("import this package as qcompiler.schedules, not as schedules")
