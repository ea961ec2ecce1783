/* The one part of the runtime that depends on a network: `model` of qc_model.h. `model.h` has the initializers. */
#if defined(__aarch64__) || defined(__arm__)
#include <sys/auxv.h>
#endif

#include "qc_model.h"
#include "model.h"

#define DECLARE(name) entry __tvm_ffi_##name;
#define POINTER(name) __tvm_ffi_##name,
QC_ENTRIES(DECLARE)

static const qc_tensor_info* const inputs[] = {QC_INPUTS};
static const qc_tensor_info* const outputs[] = {QC_OUTPUTS};
static const size_t most_input[QC_INPUT_COUNT + 1] = {QC_MOST_INPUT}, most_output[QC_OUTPUT_COUNT + 1] = {QC_MOST_OUTPUT};
static const int8_t input_axes[QC_INPUT_COUNT + 1][QC_MAX_RANK] = {QC_INPUT_AXES};
static const int8_t output_axes[QC_OUTPUT_COUNT + 1][QC_MAX_RANK] = {QC_OUTPUT_AXES};
static const pad_rule pads[QC_INPUT_COUNT + 1] = {QC_PADS};
static const model_state states[QC_STATE_COUNT + 1] = {QC_STATES};
static const int32_t steps[] = {QC_STEP_COUNTS};
static entry* const entries[QC_SHAPES] = {QC_ENTRIES(POINTER)};
static const model_probe probes[QC_PROBE_COUNT + 1] = {QC_PROBES};

static const char* missing_feature(void) { return QC_MISSING_FEATURE; }

const qc_model model = {
    .target = QC_TARGET,
    .missing_feature = missing_feature,
    .tiles = QC_TILES,
    .shapes = QC_SHAPES,
    .input_count = QC_INPUT_COUNT,
    .output_count = QC_OUTPUT_COUNT,
    .state_count = QC_STATE_COUNT,
    .inputs = inputs,
    .outputs = outputs,
    .most_input = most_input,
    .most_output = most_output,
    .axes = QC_AXES,
    .input_axes = input_axes,
    .output_axes = output_axes,
    .padded = QC_PADDED,
    .pads = pads,
    .states = states,
    .steps = steps,
    .entries = entries,
    .workspace = QC_WORKSPACE,
    .constants = QC_CONSTANTS,
    .vectors = QC_VECTORS,
    .probe_count = QC_PROBE_COUNT,
    .probes = probes,
};
