/* pool THREADS ROUNDS: what the runtime's thread pool costs, in nanoseconds. Includes the pool itself, so that its internal functions can be called.
 *
 * wake    the caller's system call that wakes sleeping workers: median of ROUNDS
 * help    from that call until a worker runs its first share: median (the caller keeps working meanwhile)
 * launch  a parallel loop of empty shares while the workers are awake: median
 */
#include "qc_threads.c"

const char qc_constants[1];
qc_status fail(qc_status status, const char* format, ...) { return (void)format, status; }
static int nothing(void* self, const argument* a, int32_t count, argument* result) { return (void)self, (void)a, (void)count, (void)result, 0; }
static entry* const entries[] = {nothing};
const qc_model model = {.shapes = 1, .workspace = 64, .entries = entries};

static pthread_t caller;
static _Atomic int64_t helped; /* when a worker ran its first share; 0: not yet */

static int first_help(int32_t task, group* environment, void* closure) {
  (void)task, (void)environment, (void)closure;
  if (pthread_equal(pthread_self(), caller)) { /* the caller's share lasts until a worker has come, at most a millisecond */
    for (int64_t end = now_ns() + 1000000; !atomic_load(&helped) && now_ns() < end;) pause_cpu();
  } else {
    int64_t none = 0;
    atomic_compare_exchange_strong(&helped, &none, now_ns());
  }
  return 0;
}

static int empty(int32_t task, group* environment, void* closure) { return (void)task, (void)environment, (void)closure, 0; }

static int by_value(const void* a, const void* b) {
  int64_t x = *(const int64_t*)a, y = *(const int64_t*)b;
  return (x > y) - (x < y);
}

int main(int count, char** words) {
  engine* e;
  if (count != 3) return 2;
  int rounds = atoi(words[2]), seen = 0;
  int64_t *wakes = malloc(sizeof(int64_t) * (size_t)rounds), *helps = malloc(sizeof(int64_t) * (size_t)rounds), *launches = malloc(sizeof(int64_t) * (size_t)rounds);
  if (!wakes || !helps || !launches || rounds < 1 || engine_create(atoi(words[1]), &e) || !e->started) return 2;
  caller = pthread_self();
  for (int i = 0; i < rounds; ++i) {
    struct timespec nap = {0, 300000}; /* workers go to sleep */
    nanosleep(&nap, 0);
    begin_run(e);
    int64_t start = now_ns();
    wake(e);
    wakes[i] = now_ns() - start;
    atomic_store(&helped, 0);
    parallel_launch(first_help, 0, 0);
    if (atomic_load(&helped)) helps[seen++] = atomic_load(&helped) - start;
    start = now_ns();
    for (int j = 0; j < 50; ++j) parallel_launch(empty, 0, 0);
    launches[i] = (now_ns() - start) / 50;
    end_run(e);
  }
  qsort(wakes, (size_t)rounds, sizeof *wakes, by_value);
  qsort(helps, (size_t)seen, sizeof *helps, by_value);
  qsort(launches, (size_t)rounds, sizeof *launches, by_value);
  printf("{\"wake\": %lld, \"help\": %lld, \"launch\": %lld, \"rounds_helped\": %d}\n", (long long)wakes[rounds / 2], seen ? (long long)helps[seen / 2] : -1LL,
         (long long)launches[rounds / 2], seen);
  engine_destroy(e);
  return 0;
}
