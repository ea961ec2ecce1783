// qc_run: runs a compiled library on arrays, or measures it. Needs nothing but the library.
#include <sys/stat.h>

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <future>
#include <map>
#include <mutex>
#include <numeric>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "npy.hpp"
#include "qcompiler/pool.hpp"
#include "qcompiler/qcompiler.hpp"

namespace {

constexpr const char* kUsage =
    "usage: qc_run MODEL.so --input NAME=X.npy ... --output DIR [--threads N] [--bench ITERATIONS]\n"
    "       qc_run MODEL.so --throughput SECONDS [--streams N] [--threads N] [--rate R] [--deadline S] [--pin]\n"
    "\n"
    "Run MODEL.so once and write every output as DIR/NAME.npy (characters outside A-Z a-z 0-9 . _ - become _).\n"
    "  --input NAME=X.npy   an array for one input; repeat for more. States that the library keeps are zeros unless they are given. A library for\n"
    "                       several shapes runs at the one that the arrays have, or pads them where it was compiled with rules for that\n"
    "  --output DIR         folder for the outputs; it is made when missing. Optional with --bench\n"
    "  --threads N          threads of one run (default 1)\n"
    "  --bench ITERATIONS   then measure that many runs, and print minimum, median and p99 in seconds as JSON.\n"
    "                       Without --output, inputs that are not given are zeros: int8 kernels take the same time for any values\n"
    "  --throughput SECONDS put load on several sessions, and print requests a second, p50, p90 and p99 in seconds as JSON\n"
    "  --streams N          sessions that run at the same time (default 1)\n"
    "  --rate R             requests a second that are due whatever happens; otherwise the queue is always full\n"
    "  --deadline S         of a library for several batches: seconds that a request of the least waits for others to run with\n"
    "  --pin                keep each stream on CPUs of its own\n"
    "  --numbered DIR       instead of --input and --output: input number N is DIR/inN.npy, output number N becomes DIR/outN.npy\n"
    "  --shape N            of a library for several shapes: its shape number N, from 0, for --numbered and for inputs that are not given\n"
    "  --profile ITERATIONS measure every step in that many runs, and print the least seconds of each as JSON. Inputs as for --bench\n"
    "  --steps PLAN         run step by step, and write what steps leave in memory into DIR/steps.bin: PLAN has lines `STEP workspace OFFSET BYTES` and\n"
    "                       `STEP output INDEX BYTES`, in the order of the steps; those bytes are appended after the step\n"
    "  --selftest           run the library's test vectors first\n"
    "exit status: 0 done, 1 the self-test failed, 2 usage or bad input\n";

struct Arguments {
  std::string model, output, plan;
  bool numbered = false, selftest = false;
  int profiled = 0;
  int shape = 0;  // from 1; 0: not given
  std::map<std::string, std::string> inputs;
  int threads = 1;
  int iterations = 0;
  int streams = 0;
  double throughput = 0, rate = 0, deadline = 0;
  bool pin = false;
};

double quantity(const std::string& option, const std::string& text) {
  char* end = nullptr;
  const double value = text.empty() ? 0 : std::strtod(text.c_str(), &end);
  if (!(value > 0 && value <= 1e6) || *end) throw std::runtime_error(option + " " + text + ": expected a number above 0, at most 1000000");
  return value;
}

int positive(const std::string& option, const std::string& text, int limit) {
  const bool digits = !text.empty() && text.size() < 10 && std::all_of(text.begin(), text.end(), [](unsigned char c) { return std::isdigit(c); });
  const int value = digits ? std::stoi(text) : 0;
  if (value < 1 || value > limit) throw std::runtime_error(option + " " + text + ": expected a number from 1 to " + std::to_string(limit));
  return value;
}

Arguments parse(int count, char** words) {
  Arguments arguments;
  for (int i = 1; i < count; ++i) {
    const std::string word = words[i];
    if (word.compare(0, 2, "--") != 0) {
      if (!arguments.model.empty()) throw std::runtime_error("two libraries given: " + arguments.model + " and " + word);
      arguments.model = word;
      continue;
    }
    if (word == "--selftest") {
      arguments.selftest = true;
      continue;
    }
    if (word == "--pin") {
      arguments.pin = true;
      continue;
    }
    static const std::set<std::string> known = {"--input", "--output", "--threads", "--bench", "--throughput", "--streams", "--rate", "--deadline", "--profile", "--steps", "--numbered", "--shape"};
    if (!known.count(word)) throw std::runtime_error("unknown option " + word);
    if (i + 1 == count) throw std::runtime_error(word + " wants a value");
    const std::string value = words[++i];
    if (word == "--threads") {
      arguments.threads = positive(word, value, 1024);
    } else if (word == "--bench") {
      arguments.iterations = positive(word, value, 100000000);
    } else if (word == "--streams") {
      arguments.streams = positive(word, value, 1024);
    } else if (word == "--throughput") {
      arguments.throughput = quantity(word, value);
    } else if (word == "--rate") {
      arguments.rate = quantity(word, value);
    } else if (word == "--deadline") {
      arguments.deadline = quantity(word, value);
    } else if (word == "--profile") {
      arguments.profiled = positive(word, value, 100000000);
    } else if (word == "--shape") {
      arguments.shape = value == "0" ? 1 : positive(word, value, 100000) + 1;
    } else if (word == "--steps") {
      arguments.plan = value;
    } else if (word == "--output" || word == "--numbered") {
      arguments.output = value;
      arguments.numbered = word == "--numbered";
    } else {
      const std::size_t equals = value.find('=');
      if (equals == std::string::npos || equals == 0 || equals + 1 == value.size()) throw std::runtime_error("--input " + value + ": expected NAME=FILE.npy");
      if (!arguments.inputs.emplace(value.substr(0, equals), value.substr(equals + 1)).second)
        throw std::runtime_error("--input " + value.substr(0, equals) + " is given twice");
    }
  }
  if (arguments.model.empty()) throw std::runtime_error("no library given");
  if (!arguments.throughput && (arguments.streams || arguments.rate || arguments.deadline || arguments.pin))
    throw std::runtime_error("--streams, --rate, --deadline and --pin go with --throughput");
  if (arguments.throughput && (!arguments.output.empty() || arguments.iterations)) throw std::runtime_error("--throughput measures only; leave out --output and --bench");
  if (arguments.output.empty() && !arguments.plan.empty()) throw std::runtime_error("--steps wants --output DIR or --numbered DIR");
  if (arguments.numbered && !arguments.inputs.empty()) throw std::runtime_error("--numbered names the inputs; leave --input out");
  if (arguments.output.empty() && !arguments.iterations && !arguments.throughput && !arguments.profiled && !arguments.selftest)
    throw std::runtime_error("give --output DIR, or --bench ITERATIONS or --throughput SECONDS to measure only");
  return arguments;
}

void set_input(qcompiler::Tensor tensor, const std::string& path, const npy::Array& array) {
  const std::string descr = npy::type_of(tensor.dtype()).descr;
  if (array.dtype != tensor.dtype()) throw std::runtime_error(path + ": has elements of type " + npy::type_of(array.dtype).descr + ", input '" + tensor.name() + "' wants " + descr);
  if (array.shape != tensor.shape())
    throw std::runtime_error(path + ": has shape " + tensor.text(array.shape) + ", input '" + tensor.name() + "' wants " + tensor.text(tensor.shape()));
  tensor.copy_bytes_from(array.data.data());
}

// A port's name as a file name; `taken` keeps two names from becoming one file.
std::string file_name(std::string name, std::set<std::string>& taken) {
  for (char& c : name)
    if (!std::isalnum(static_cast<unsigned char>(c)) && !std::strchr("._-", c)) c = '_';
  if (name.empty() || name[0] == '.') name.insert(0, "_");
  if (name.size() > 200) name.resize(200);
  std::string unique = name;
  for (int i = 1; !taken.insert(unique).second; ++i) unique = name + "_" + std::to_string(i);
  return unique + ".npy";
}

void measure(qcompiler::Session& session, const Arguments& arguments) {
  using clock = std::chrono::steady_clock;
  for (int i = 0; i < std::min(arguments.iterations, 10); ++i) session.run();
  std::vector<double> seconds;
  for (int i = 0; i < arguments.iterations; ++i) {
    const auto start = clock::now();
    session.run();
    seconds.push_back(std::chrono::duration<double>(clock::now() - start).count());
  }
  std::sort(seconds.begin(), seconds.end());
  const auto quantile = [&](double q) { return seconds[static_cast<std::size_t>(std::ceil(q * static_cast<double>(seconds.size()))) - 1]; };
  std::printf("{\"target\": \"%s\", \"threads\": %d, \"iterations\": %d, \"seconds\": {\"minimum\": %.9f, \"median\": %.9f, \"mean\": %.9f, \"p90\": %.9f, \"p99\": %.9f}}\n",
              session.target().c_str(), arguments.threads, arguments.iterations, seconds.front(), quantile(0.5),
              std::accumulate(seconds.begin(), seconds.end(), 0.0) / static_cast<double>(seconds.size()), quantile(0.9), quantile(0.99));
}

// Requests share the inputs; each stream's answers go to buffers of their own, as many as requests can be on their way.
void load(qcompiler::Session& session, const Arguments& arguments) {
  using clock = std::chrono::steady_clock;
  const int streams = std::max(arguments.streams, 1), waiting = (arguments.deadline > 0 ? 64 : 2) * streams;  // as many as fill batches
  qcompiler::PoolOptions options{streams, arguments.threads, waiting, arguments.pin, {}};
  if (arguments.deadline > 0) options.deadline = arguments.deadline;
  qcompiler::SessionPool pool(arguments.model, options);
  std::vector<const void*> inputs;
  std::vector<std::vector<std::int64_t>> shapes;
  for (qcompiler::Tensor tensor : session.inputs()) {
    inputs.push_back(tensor.raw_data());
    shapes.push_back(tensor.shape());
  }
  struct Place {
    std::vector<std::vector<std::uint64_t>> memory;
    std::vector<void*> outputs;
    std::future<void> done;
  };
  std::vector<Place> places(static_cast<std::size_t>(streams + waiting + 1));
  for (Place& place : places)
    for (const qcompiler::Tensor& tensor : session.outputs()) {
      place.memory.emplace_back(tensor.bytes() / 8 + 1);
      place.outputs.push_back(place.memory.back().data());
    }
  std::vector<double> seconds;
  std::mutex lock;
  const auto submit = [&](Place& place, clock::time_point due) {
    if (place.done.valid()) place.done.get();
    const auto then = [&seconds, &lock, due] {
      const double taken = std::chrono::duration<double>(clock::now() - due).count();
      const std::lock_guard<std::mutex> guard(lock);
      seconds.push_back(taken);
    };
    place.done = session.shapes().size() > 1 ? pool.submit_at(shapes, inputs, place.outputs, then) : pool.submit(inputs, place.outputs, then);
  };
  for (Place& place : places) submit(place, clock::now());
  for (Place& place : places) place.done.get();
  seconds.clear();
  const auto begin = clock::now();
  const auto since = [&](clock::time_point t) { return std::chrono::duration<double>(t - begin).count(); };
  for (std::size_t i = 0;; ++i) {
    clock::time_point due = clock::now();
    if (arguments.rate > 0) due = begin + std::chrono::duration_cast<clock::duration>(std::chrono::duration<double>(static_cast<double>(i) / arguments.rate));
    if (i && since(due) >= arguments.throughput) break;
    std::this_thread::sleep_until(due);
    submit(places[i % places.size()], due);
  }
  for (Place& place : places)
    if (place.done.valid()) place.done.get();
  const double total = since(clock::now());
  std::sort(seconds.begin(), seconds.end());
  const auto quantile = [&](double q) { return seconds[static_cast<std::size_t>(std::ceil(q * static_cast<double>(seconds.size()))) - 1]; };
  std::printf("{\"target\": \"%s\", \"streams\": %d, \"threads\": %d, \"requests\": %zu, \"per_second\": %.3f, \"seconds\": {\"p50\": %.9f, \"p90\": %.9f, \"p99\": %.9f}}\n",
              pool.target().c_str(), streams, arguments.threads, seconds.size(), static_cast<double>(seconds.size()) / total, quantile(0.5), quantile(0.9),
              quantile(0.99));
}

// The caller's memory for step by step: zeroed, 64-byte aligned.
struct Workspace {
  explicit Workspace(std::size_t bytes) : held(bytes + 64) {}
  char* data() { return held.data() + (64 - reinterpret_cast<std::uintptr_t>(held.data()) % 64) % 64; }
  std::vector<char> held;
};

void trace(qcompiler::Session& session, const std::string& plan, const std::string& path) {
  std::vector<char> lines = npy::read_bytes(plan);
  lines.push_back('\0');
  std::vector<qcompiler::Tensor> outputs = session.outputs();
  Workspace workspace(session.workspace_bytes());
  std::FILE* file = std::fopen(path.c_str(), "wb");
  if (!file) throw std::runtime_error(path + ": can't be written: " + std::strerror(errno));
  int done = 0, step = 0;
  char space[16];
  std::size_t at = 0, count = 0;
  bool fine = true;
  for (const char* line = lines.data(); fine && std::sscanf(line, "%d %15s %zu %zu", &step, space, &at, &count) == 4;) {
    line += std::strcspn(line, "\n");
    line += *line == '\n';
    const bool held = std::strcmp(space, "workspace") == 0 && at <= session.workspace_bytes() && count <= session.workspace_bytes() - at;
    const bool port = std::strcmp(space, "output") == 0 && at < outputs.size() && count <= outputs[at].bytes();
    if (step < done - 1 || step >= session.steps() || !(held || port)) {
      std::fclose(file);
      throw std::runtime_error(plan + ": has a line that does not fit the library");
    }
    session.execute(workspace.data(), done, step + 1);
    done = step + 1;
    const void* source = held ? workspace.data() + at : outputs[at].raw_data();
    fine = std::fwrite(source, 1, count, file) == count;
  }
  session.execute(workspace.data(), done, session.steps());
  fine = std::fclose(file) == 0 && fine;
  if (!fine) throw std::runtime_error(path + ": can't be written: " + std::strerror(errno));
}

void profile(qcompiler::Session& session, int iterations) {
  Workspace workspace(session.workspace_bytes());
  std::vector<double> least = session.profile(workspace.data());
  for (int i = 0; i < iterations; ++i) {
    const std::vector<double> seconds = session.profile(workspace.data());
    std::transform(least.begin(), least.end(), seconds.begin(), least.begin(), [](double a, double b) { return std::min(a, b); });
  }
  std::printf("{\"steps\": [");
  for (std::size_t i = 0; i < least.size(); ++i) std::printf("%s%.9g", i ? ", " : "", least[i]);
  std::printf("]}\n");
}

void run(const Arguments& arguments) {
  qcompiler::Session session(arguments.model, {arguments.threads});
  if (arguments.selftest) {
    session.selftest();
    std::printf("{\"selftest\": \"passed\"}\n");
  }
  std::map<std::string, npy::Array> arrays;
  for (const auto& [name, path] : arguments.inputs) {
    session.input(name);  // is there one of that name?
    arrays.emplace(name, npy::read(path));
  }
  if (arguments.shape > static_cast<int>(session.shapes().size()))
    throw std::runtime_error("--shape " + std::to_string(arguments.shape - 1) + ": " + arguments.model + " has " + std::to_string(session.shapes().size()));
  if (arguments.shape) session.fit(session.shapes()[static_cast<std::size_t>(arguments.shape - 1)]);
  else if (arguments.numbered && session.shapes().size() > 1)
    throw std::runtime_error(arguments.model + ": has several shapes; say which with --shape, or name the inputs with --input");
  std::vector<qcompiler::Tensor> ports = session.inputs();
  for (std::size_t i = 0; i < ports.size() && arguments.numbered; ++i) {
    const std::string path = arguments.output + "/in" + std::to_string(i) + ".npy";
    set_input(ports[i], path, npy::read(path));
  }
  if (session.shapes().size() > 1 && !arrays.empty()) {
    qcompiler::Shapes shapes;
    for (const auto& [name, array] : arrays) shapes[name] = array.shape;
    session.fit(shapes);
  }
  for (const auto& [name, array] : arrays) set_input(session.input(name), arguments.inputs.at(name), array);
  for (qcompiler::Tensor tensor : session.inputs())
    if (!arguments.numbered && !arguments.inputs.count(tensor.name()) && !tensor.is_state()) {
      if (!arguments.output.empty())
        throw std::runtime_error("input '" + tensor.name() + "' is missing: give --input " + tensor.name() + "=FILE.npy, " +
                                 npy::type_of(tensor.dtype()).descr + " of shape " + tensor.text(tensor.shape()));
      const std::vector<char> zeros(tensor.bytes());
      tensor.copy_bytes_from(zeros.data());
    }
  if (!arguments.output.empty()) {
    if (mkdir(arguments.output.c_str(), 0777) != 0 && errno != EEXIST) throw std::runtime_error(arguments.output + ": can't be made: " + std::strerror(errno));
    if (arguments.plan.empty()) session.run();
    else trace(session, arguments.plan, arguments.output + "/steps.bin");
    std::set<std::string> taken;
    int count = 0;
    for (qcompiler::Tensor tensor : session.outputs()) {
      const std::string name = arguments.numbered ? "out" + std::to_string(count++) + ".npy" : file_name(tensor.name(), taken);
      std::vector<char> bytes(tensor.bytes());
      tensor.copy_bytes_to(bytes.data());
      npy::write(arguments.output + "/" + name, tensor.dtype(), tensor.shape(), bytes.data(), bytes.size());
    }
  }
  if (arguments.iterations) measure(session, arguments);
  if (arguments.profiled) profile(session, arguments.profiled);
  if (arguments.throughput > 0) load(session, arguments);
}

}  // namespace

int main(int count, char** words) {
  if (count == 2 && (std::strcmp(words[1], "--help") == 0 || std::strcmp(words[1], "-h") == 0)) {
    std::fputs(kUsage, stdout);
    return 0;
  }
  try {
    run(parse(count, words));
  } catch (const qcompiler::Error& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return error.code() == QC_ERROR_SELFTEST ? 1 : 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    if (count == 1) std::fputs(kUsage, stderr);
    return 2;
  }
  return 0;
}
