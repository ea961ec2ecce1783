/* AMX tile instructions as Intel's manual describes them, each thread with tiles of its own; what would fault ends the process with a message. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static _Thread_local struct {
  int configured;
  int rows[8], row_bytes[8];
  unsigned char tile[8][16][64];
} state;

int qc_emulated_multiplications; /* of all threads: whether there were any */

static void demand(int condition, const char* message) {
  if (condition) return;
  fprintf(stderr, "emulated tiles: %s\n", message);
  abort();
}

static void demand_tile(int t) { demand(state.configured && t >= 0 && t < 8 && state.rows[t] > 0, "a tile that is not configured"); }

int qc_emulated_ldtilecfg(const unsigned char* config) {
  demand(config[0] == 1, "the palette is not 1");
  for (int i = 1; i < 16; ++i) demand(config[i] == 0, "reserved bytes or a start row are not 0");
  memset(&state, 0, sizeof state);
  for (int t = 0; t < 16; ++t) {
    int rows = config[48 + t], row_bytes = config[16 + 2 * t] | config[17 + 2 * t] << 8;
    if (t >= 8) {
      demand(rows == 0 && row_bytes == 0, "more than 8 tiles");
      continue;
    }
    demand(rows <= 16 && row_bytes <= 64 && !rows == !row_bytes, "a tile of impossible size");
    state.rows[t] = rows, state.row_bytes[t] = row_bytes;
  }
  return state.configured = 1;
}

int qc_emulated_tilerelease(void) {
  memset(&state, 0, sizeof state);
  return 0;
}

int qc_emulated_tilezero(int t) {
  demand_tile(t);
  memset(state.tile[t], 0, sizeof state.tile[t]);
  return 0;
}

int qc_emulated_tileloadd64(int t, const unsigned char* source, int64_t stride) {
  demand_tile(t);
  memset(state.tile[t], 0, sizeof state.tile[t]);
  for (int r = 0; r < state.rows[t]; ++r) memcpy(state.tile[t][r], source + r * stride, (size_t)state.row_bytes[t]);
  return 0;
}

int qc_emulated_tilestored64(int t, unsigned char* target, int64_t stride) {
  demand_tile(t);
  for (int r = 0; r < state.rows[t]; ++r) memcpy(target + r * stride, state.tile[t][r], (size_t)state.row_bytes[t]);
  return 0;
}

int qc_emulated_tdpbusd(int c, int a, int b) {
  demand_tile(c), demand_tile(a), demand_tile(b);
  demand(c != a && c != b && a != b, "TDPBUSD: the tiles are not different");
  demand(state.rows[c] == state.rows[a] && state.row_bytes[c] == state.row_bytes[b], "TDPBUSD: the sizes of the sums and the factors differ");
  demand(state.row_bytes[a] == 4 * state.rows[b] && state.row_bytes[c] % 4 == 0, "TDPBUSD: the sizes of the factors differ");
  for (int m = 0; m < state.rows[c]; ++m)
    for (int n = 0; n < state.row_bytes[c] / 4; ++n) {
      int32_t sum;
      memcpy(&sum, &state.tile[c][m][4 * n], 4);
      for (int k = 0; k < state.row_bytes[a]; ++k) sum += state.tile[a][m][k] * (int8_t)state.tile[b][k / 4][4 * n + k % 4];
      memcpy(&state.tile[c][m][4 * n], &sum, 4);
    }
  __atomic_fetch_add(&qc_emulated_multiplications, 1, __ATOMIC_RELAXED);
  return 0;
}
