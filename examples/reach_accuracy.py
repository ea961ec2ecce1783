"""As much accuracy as is needed, as much speed as is left: ask for a quality, and let the compiler keep those layers in float that it takes."""

import qcompiler
from qcompiler.cli.demo import MODEL, demo_data


def main() -> None:
    calibration, evaluation, _ = demo_data()

    # What the layers cost, before anything is compiled.
    print(qcompiler.explain(MODEL, calibration=calibration[:16], preset="fast", sensitivity=True))

    artifact = qcompiler.compile(MODEL, calibration=calibration[:48], preset="fast", min_sqnr=36, time_budget=120)
    account = artifact.manifest["mixed_precision"]
    print(account["statement"])
    for plan in account["points"]:
        mark = "<- chosen" if plan["chosen"] else ""
        print(f"{len(plan['float_layers']):2} layers in float: {plan['sqnr_db']:5.1f} dB, {plan['seconds'] * 1e6:6.1f} us {mark}")

    # The same choice again, without measuring: name the layers.
    chosen = next(p for p in account["points"] if p["chosen"])
    again = qcompiler.compile(MODEL, calibration=calibration[:36], preset="fast", keep_float=chosen["float_layers"])
    print(f"SQNR on other digits: {qcompiler.verify(again, MODEL, evaluation[:40]).outputs[0].metrics.sqnr_db:.1f} dB")


if __name__ == "__main__":
    main()
