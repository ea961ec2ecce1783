"""From a float network to a library that is proven: compile, verify, run. About ten seconds; run it anywhere."""

import qcompiler
from qcompiler.cli.demo import MODEL, demo_data


def main() -> None:
    calibration, evaluation, labels = demo_data()  # lists of {"image": float32 [1, 1, 16, 16]}, and class indices

    artifact = qcompiler.compile(MODEL, target="native", calibration=calibration[:40])
    library = artifact.save("digits.so")
    count = artifact.manifest["operators"]
    print(f"{library}: {artifact.size / 1e3:.0f} kB, {count['int8']} operators in int8, {count['float']} in float")

    # The digits of the verification are others than those of the calibration.
    report = qcompiler.verify(library, MODEL, evaluation[:100], labels=labels[:100], min_sqnr=20, max_accuracy_drop=2)
    print(report)
    assert report.passed

    session = qcompiler.load(library, threads=1)
    print(session)
    logits = session.run(evaluation[0])["logits"]
    print(f"the first digit is a {logits.argmax()}, its label says {labels[0]}")


if __name__ == "__main__":
    main()
