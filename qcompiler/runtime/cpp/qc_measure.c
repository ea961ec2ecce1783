/* qc_measure: checks and times the candidates of a tuning round on the machine where it runs. Needs libc, and what the libraries need.
 *
 *     qc_measure [RESULTS.jsonl [SECONDS]]     (default results.jsonl 10; in the folder that `qcompiler tune --export-candidates` wrote)
 *
 * candidates.txt says what there is: a library per task, whose steps are candidates for one operator (step 0 is the default). Each is run on inputs made from a
 * recipe; its output must have the expected sums, and nothing around it may change. Those that pass are timed in turns, at most SECONDS per library. A
 * library is opened in a process of its own, so a candidate that crashes, hangs or breaks a GPU's context costs nobody else. Results are written as they
 * come. */
#define _GNU_SOURCE
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "qcompiler/loader.h"

enum { GUARD = 4096, CANARY = 0xA5, MAX_INPUTS = 8, MAX_CASES = 8, MAX_STEPS = 1024, MAX_TASKS = 10000, ROUNDS = 60, LEAST_ROUNDS = 3, PATIENCE_SECONDS = 30 };

static const void* no_inputs[1]; /* all tensors lie in the workspace */
static void* no_outputs[1];

/* A tensor in the workspace: element (n, h, w, c) is at ((n * rows + top + h) * columns + left + w) * pitch + c. `zero`: the byte of its halo. */
typedef struct {
  char kind; /* 'i': int8; 'u': 8-bit, q stored as q + 128; 'f': float32 */
  long offset, bytes, n, rows, columns, pitch, top, left, height, width, channels, zero;
} tensor;

typedef struct {
  char library[64];
  int steps, inputs, cases;
  tensor input[MAX_INPUTS], output;
  uint64_t sums[MAX_CASES][2];
} task;

/* How a child ends that can't go on: with the library, for lack of memory, or with a candidate after which a GPU refuses everything. */
enum { UNUSABLE = 3, NO_MEMORY = 4, START_OVER = 5 };

/* What the measuring child shares with its parent. */
typedef struct {
  int current; /* the candidate that runs now */
  char status[MAX_STEPS]; /* 0: not looked at, 'k': right, 'w': wrong, 'c': crashed, 'h': hung, 'e': refused to run */
  double seconds[MAX_STEPS][2];
  char message[512];
  qc_status refused; /* why there is no session */
  char host[256];
} board;

static void die(const char* what, const char* why) {
  fprintf(stderr, "error: %s: %s\n", what, why);
  exit(2);
}

static int read_tensor(FILE* file, tensor* t) {
  return fscanf(file, " %c %ld %ld %ld %ld %ld %ld %ld %ld %ld %ld %ld %ld", &t->kind, &t->offset, &t->bytes, &t->n, &t->rows, &t->columns, &t->pitch, &t->top,
                &t->left, &t->height, &t->width, &t->channels, &t->zero) == 13;
}

static void read_task(FILE* file, task* t) {
  int fine = fscanf(file, "%63s %d %d %d", t->library, &t->steps, &t->inputs, &t->cases) == 4 && t->steps <= MAX_STEPS && t->inputs <= MAX_INPUTS && t->cases <= MAX_CASES;
  for (int i = 0; i < t->inputs && fine; ++i) fine = read_tensor(file, &t->input[i]);
  if (fine) fine = read_tensor(file, &t->output);
  for (int i = 0; i < t->cases && fine; ++i)
    fine = fscanf(file, "%llx %llx", (unsigned long long*)&t->sums[i][0], (unsigned long long*)&t->sums[i][1]) == 2;
  if (!fine) die("candidates.txt", "damaged or of another version; export again");
}

/* ---- inputs and checks ----------------------------------------------------------------------------------------------------------- */

/* Number `counter` of stream `seed` (splitmix64: Steele, Lea, Flood 2014). */
static uint64_t mixed(uint64_t seed, uint64_t counter) {
  uint64_t z = (seed << 32) + (counter + 1) * 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

static long width_of(const tensor* t) { return t->kind == 'i' || t->kind == 'u' ? 1 : 4; }

/* Element `e` (counted over the valid ones) of input `number` in case `number_of_case`: case 0 is random, others have the extremes only. */
static void put(unsigned char* at, const tensor* t, int number_of_case, int number, uint64_t e) {
  uint64_t r = mixed((uint64_t)(number_of_case * MAX_INPUTS + number), e);
  if (width_of(t) == 1) {
    unsigned char q = number_of_case ? (r >> 63 ? 127 : 128) : (unsigned char)(r >> 56);
    *at = t->kind == 'u' ? q ^ 128 : q;
  } else {
    int16_t k = (int16_t)(r >> 48);
    float value = number_of_case ? (k < 0 ? -8.0f : 8.0f) : (float)k / 4096.0f;
    memcpy(at, &value, 4);
  }
}

typedef void (*visitor)(unsigned char* at, const tensor* t, uint64_t e, void* context);

static void visit(unsigned char* workspace, const tensor* t, visitor f, void* context) {
  long size = width_of(t);
  uint64_t e = 0;
  for (long n = 0; n < t->n; ++n)
    for (long h = 0; h < t->height; ++h)
      for (long w = 0; w < t->width; ++w)
        for (long c = 0; c < t->channels; ++c, ++e)
          f(workspace + t->offset + (((n * t->rows + t->top + h) * t->columns + t->left + w) * t->pitch + c) * size, t, e, context);
}

typedef struct { int number_of_case, number; } recipe;

static void fill(unsigned char* at, const tensor* t, uint64_t e, void* context) {
  const recipe* r = context;
  put(at, t, r->number_of_case, r->number, e);
}

static void fill_inputs(unsigned char* workspace, const task* t, int number_of_case) {
  for (int i = 0; i < t->inputs; ++i) {
    recipe r = {number_of_case, i};
    memset(workspace + t->input[i].offset, (int)t->input[i].zero, (size_t)t->input[i].bytes);
    visit(workspace, &t->input[i], fill, &r);
  }
}

/* Sums over the valid elements as 32-bit words: a of the words, b of a's values. Reads each element and puts the canary there. */
typedef struct { uint64_t a, b; uint32_t word; int held; } sums;

static void add(unsigned char* at, const tensor* t, uint64_t e, void* context) {
  sums* s = context;
  (void)e;
  for (long i = 0; i < width_of(t); ++i) {
    s->word |= (uint32_t)at[i] << 8 * s->held;
    at[i] = CANARY;
    if (++s->held < 4) continue;
    s->a += s->word, s->b += s->a;
    s->word = 0, s->held = 0;
  }
}

static void clear(unsigned char* at, const tensor* t, uint64_t e, void* context) {
  (void)e, (void)context;
  memset(at, CANARY, (size_t)width_of(t));
}

/* Whether step `step` gives the expected output in every case, and leaves the guards and the halo alone. */
static char check(qc_library* model, qc_session* session, unsigned char* workspace, const task* t, int step, char* message, size_t size) {
  const tensor* o = &t->output;
  unsigned char* region = workspace + o->offset - GUARD;
  tensor padded = *o; /* with the channels up to the pitch, which may hold anything afterwards */
  padded.channels = o->pitch;
  for (int c = 0; c < t->cases; ++c) {
    fill_inputs(workspace, t, c);
    memset(region, CANARY, (size_t)o->bytes + 2 * GUARD);
    if (model->session_execute(session, workspace, 0, no_inputs, no_outputs, step, step + 1)) {
      snprintf(message, size, "%s", model->last_error());
      return 'e';
    }
    sums s = {0, 0, 0, 0};
    visit(workspace, o, add, &s);
    if (s.held) s.a += s.word, s.b += s.a;
    if (s.a != t->sums[c][0] || s.b != t->sums[c][1]) return 'w';
    visit(workspace, &padded, clear, 0);
    for (long i = 0; i < o->bytes + 2 * GUARD; ++i)
      if (region[i] != CANARY) return 'w';
  }
  return 'k';
}

/* ---- one library in a process of its own ------------------------------------------------------------------------------------------ */

static void open_session(const char* path, int threads, qc_library* model, qc_session** session, board* b) {
  if ((b->refused = qc_library_open(path, model, b->message, sizeof b->message)) != QC_OK) _exit(UNUSABLE);
  if ((b->refused = model->session_create(threads, session)) == QC_OK) return;
  snprintf(b->message, sizeof b->message, "%s: %s", path, model->last_error());
  _exit(UNUSABLE);
}

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void measure(const task* t, int threads, double limit, board* b) {
  qc_library model;
  qc_session* sessions[2];
  const int ways = threads > 1 ? 2 : 1; /* on one thread, and on all */
  for (int way = 0; way < ways; ++way) open_session(t->library, way ? threads : 1, &model, &sessions[way], b);
  unsigned char* workspace;
  if (posix_memalign((void**)&workspace, 64, model.workspace_bytes())) _exit(NO_MEMORY);
  memset(workspace, 0, model.workspace_bytes());
  double* seconds = calloc((size_t)t->steps, sizeof *seconds);
  if (!seconds) _exit(NO_MEMORY);
  for (b->current = 0; b->current < t->steps; ++b->current) {
    if (b->status[b->current]) continue;
    alarm(PATIENCE_SECONDS);
    char found = check(&model, sessions[0], workspace, t, b->current, b->message, sizeof b->message);
    b->status[b->current] = found;
    if (found == 'e') _exit(START_OVER);
  }
  fill_inputs(workspace, t, 0);
  for (int i = 0; i < t->steps; ++i) b->seconds[i][0] = b->seconds[i][1] = INFINITY;
  const double begin = now();
  for (int round = 0; round < ROUNDS && (round < LEAST_ROUNDS || now() - begin < limit); ++round)
    for (int offset = 0; offset < t->steps; ++offset) {
      int i = (round + offset) % t->steps;
      b->current = i;
      if (b->status[i] != 'k') continue;
      alarm(PATIENCE_SECONDS);
      for (int way = 0; way < ways; ++way) {
        if (model.session_profile(sessions[way], workspace, 0, no_inputs, no_outputs, i, i + 1, seconds)) {
          snprintf(b->message, sizeof b->message, "%s", model.last_error());
          b->status[i] = 'e';
          _exit(START_OVER);
        }
        if (seconds[i] < b->seconds[i][way]) b->seconds[i][way] = seconds[i];
      }
    }
  _exit(0);
}

/* Start over after a crash, without the candidate that crashed. Returns 0 when the library can't be used at all. */
static int supervise(const task* t, int threads, double limit, board* b) {
  memset(b, 0, sizeof *b);
  for (int attempt = 0; attempt <= t->steps; ++attempt) {
    pid_t child = fork();
    if (child < 0) die("fork", strerror(errno));
    if (child == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL); /* whoever ends this program ends its work */
      measure(t, threads, limit, b);
    }
    int status;
    waitpid(child, &status, 0);
    if (WIFEXITED(status) && WEXITSTATUS(status) != START_OVER) {
      if (WEXITSTATUS(status) == NO_MEMORY) snprintf(b->message, sizeof b->message, "%s: out of memory", t->library);
      return WEXITSTATUS(status) == 0;
    }
    if (WIFEXITED(status)) fprintf(stderr, "%s, candidate %d: %s\n", t->library, b->current, b->message);
    else b->status[b->current] = WTERMSIG(status) == SIGALRM ? 'h' : 'c';
    snprintf(b->message, sizeof b->message, "%s: every attempt failed", t->library);
  }
  return 0;
}

/* ---- the program ------------------------------------------------------------------------------------------------------------------ */

static void cpu_name(char* name, size_t size) {
  char line[512];
  FILE* file = fopen("/proc/cpuinfo", "r");
  snprintf(name, size, "unknown");
  while (file && fgets(line, sizeof line, file))
    if (!strncmp(line, "model name", 10) && strchr(line, ':')) {
      snprintf(name, size, "%s", strchr(line, ':') + 2);
      break;
    }
  if (file) fclose(file);
}

/* Make a session in a child, because a GPU's driver doesn't survive fork, to learn where libraries run; where none can, that is the one error. */
static void find_host(const char* library, board* b) {
  memset(b, 0, sizeof *b);
  pid_t child = fork();
  if (child < 0) die("fork", strerror(errno));
  if (child == 0) {
    qc_library model;
    qc_session* session;
    open_session(library, 1, &model, &session, b);
    void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD); /* only what the library has opened */
    int (*device_name)(char*, int, int) = 0;
    if (driver) *(void**)&device_name = dlsym(driver, "cuDeviceGetName");
    if (!device_name || device_name(b->host, (int)sizeof b->host, 0)) cpu_name(b->host, sizeof b->host);
    _exit(0);
  }
  waitpid(child, 0, 0);
  if (b->refused == QC_ERROR_DEVICE) die("this machine can't measure these candidates", b->message);
  if (!*b->host) cpu_name(b->host, sizeof b->host); /* something else ails this library; others may do */
  size_t used = 0;
  for (const char* c = b->host; *c; ++c)
    if (*c >= 32 && *c < 127 && *c != '"' && *c != '\\') b->host[used++] = *c;
  b->host[used] = 0;
}

int main(int count, char** words) {
  const char* path = count > 1 ? words[1] : "results.jsonl";
  char* end = "";
  const double limit = count > 2 ? strtod(words[2], &end) : 10;
  if (count > 3 || (count > 1 && words[1][0] == '-') || *end || !(limit >= 0))
    return fputs("usage: qc_measure [RESULTS.jsonl [SECONDS]], in the folder with candidates.txt; SECONDS: at most, of timing per library (10)\n", stderr), 2;
  FILE* plan = fopen("candidates.txt", "r");
  if (!plan) die("candidates.txt", "not in this folder; run qc_measure in the folder that `qcompiler tune --export-candidates` wrote");
  char set[80];
  int version, tasks, threads;
  if (fscanf(plan, "qcompiler-candidates %d %79s %d %d", &version, set, &threads, &tasks) != 4 || version != 1 || tasks < 1 || tasks > MAX_TASKS)
    die("candidates.txt", "damaged or of another version; export again");
  task* all = calloc((size_t)tasks, sizeof *all);
  board* b = mmap(0, sizeof *b, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (!all || b == MAP_FAILED) die("memory", strerror(errno));
  for (int i = 0; i < tasks; ++i) read_task(plan, &all[i]);
  find_host(all[0].library, b);
  FILE* results = fopen(path, "w");
  if (!results) die(path, strerror(errno));
  long cores = sysconf(_SC_NPROCESSORS_ONLN);
  if (threads > cores) threads = cores > 0 ? (int)cores : 1;
  fprintf(results, "{\"results\": 1, \"set\": \"%s\", \"host\": \"%s\", \"threads\": %d}\n", set, b->host, threads);
  fflush(results);
  int wrong = 0, unusable = 0;
  for (int i = 0; i < tasks; ++i) {
    const task* t = &all[i];
    fprintf(stderr, "%d of %d: %s, %d candidates\n", i + 1, tasks, t->library, t->steps);
    if (!supervise(t, threads, limit, b)) {
      ++unusable;
      fprintf(stderr, "error: %s\n", b->message);
      continue;
    }
    for (int s = 0; s < t->steps; ++s) {
      const char* status = b->status[s] == 'k' ? "ok" : b->status[s] == 'w' ? "wrong" : b->status[s] == 'h' ? "hung" : b->status[s] == 'c' ? "crashed" : "refused";
      wrong += b->status[s] == 'w';
      fprintf(results, "{\"task\": %d, \"step\": %d, \"status\": \"%s\"", i, s, status);
      if (b->status[s] == 'k') {
        fprintf(results, ", \"seconds\": [%.9g", b->seconds[s][0]);
        if (threads > 1) fprintf(results, ", %.9g", b->seconds[s][1]);
        fputs("]", results);
      }
      fputs("}\n", results);
    }
    fflush(results);
  }
  if (fclose(results)) die(path, strerror(errno));
  fprintf(stderr, "%s: %d of %d libraries measured, %d candidates wrong; next, where the model is: qcompiler tune --log DIR --import-results %s\n", path, tasks - unusable,
          tasks, wrong, path);
  return unusable == tasks ? 2 : 0;
}
