"""A model that is quantized already (by quantization-aware training, say): its scales and weights are kept, and no calibration data is needed."""

import numpy as np

import qcompiler
from qcompiler.cli.demo import MODEL, demo_data


def main() -> None:
    calibration, evaluation, _ = demo_data()

    # Stands for the file of your training framework: a network with QuantizeLinear and DequantizeLinear.
    export = qcompiler.export_onnx(MODEL, "digits_qdq.onnx", calibration[:40], preset="fast")
    print(f"digits_qdq.onnx states {len(export.values)} scales")

    artifact = qcompiler.compile("digits_qdq.onnx")
    artifact.save("digits_qat.so")
    print(f"compiled without data: {artifact.manifest['calibration_samples']} calibration samples")

    # The file came from our own compiler, so the library computes what the direct way does.
    direct = qcompiler.compile(MODEL, calibration=calibration[:40], preset="fast", disable="streams")
    direct.save("digits_direct.so")
    sessions = [qcompiler.load(name) for name in ("digits_qat.so", "digits_direct.so")]
    equal = all(np.array_equal(*(s.run(sample)["logits"] for s in sessions)) for sample in evaluation[:50])
    print(f"bit for bit the same: {equal}")


if __name__ == "__main__":
    main()
