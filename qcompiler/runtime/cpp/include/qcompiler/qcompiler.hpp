/// @file
/// C++17 interface of a library compiled by qcompiler: header only, over the C interface beside it.
///
///     qcompiler::Session session("model.so", {.threads = 2});   // {2} before C++20
///     session.input("input").copy_from(pixels);                 // or bind(): zero copy
///     session.run();
///     const float* logits = session.output("logits").data<float>();
///
/// Link with ${CMAKE_DL_LIBS} (-ldl where dlopen is not in libc). Errors are exceptions of type qcompiler::Error; its code() is a qc_status.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "qcompiler/loader.h"
#include "qcompiler/qcompiler.h"

namespace qcompiler {

/// A failed call: what() is a sentence, code() says which kind.
class Error : public std::runtime_error {
 public:
  Error(qc_status code, const std::string& message) : std::runtime_error(message), code_(code) {}
  qc_status code() const noexcept { return code_; }

 private:
  qc_status code_;
};

namespace detail {

template <class T>
constexpr qc_dtype dtype_of() {
  using U = std::remove_cv_t<T>;
  if constexpr (std::is_same_v<U, float>) return QC_FLOAT32;
  else if constexpr (std::is_same_v<U, std::int8_t>) return QC_INT8;
  else if constexpr (std::is_same_v<U, std::uint8_t>) return QC_UINT8;
  else if constexpr (std::is_same_v<U, std::int16_t>) return QC_INT16;
  else if constexpr (std::is_same_v<U, std::int32_t>) return QC_INT32;
  else if constexpr (std::is_same_v<U, std::int64_t>) return QC_INT64;
  else if constexpr (std::is_same_v<U, std::uint16_t>) return QC_UINT16;
  else if constexpr (std::is_same_v<U, std::uint32_t>) return QC_UINT32;
  else if constexpr (std::is_same_v<U, std::uint64_t>) return QC_UINT64;
  else if constexpr (std::is_same_v<U, bool>) return QC_BOOL;
  else if constexpr (std::is_same_v<U, double>) return QC_FLOAT64;
  else static_assert(!sizeof(U), "element type without a qc_dtype; use bytes() and raw_data()");
}

/// An open library. Shared by the sessions on it; closed with the last.
class Library {
 public:
  explicit Library(const std::string& path) {
    char message[512] = "";
    qc_status status = qc_library_open(path.c_str(), &functions_, message, sizeof message);
    if (status != QC_OK) throw Error(status, message);
  }
  explicit Library(const qc_library& linked) : functions_(linked) {}
  ~Library() { qc_library_close(&functions_); }
  Library(const Library&) = delete;
  Library& operator=(const Library&) = delete;

  const qc_library* operator->() const noexcept { return &functions_; }
  const qc_library& functions() const noexcept { return functions_; }
  void check(qc_status status) const {
    if (status != QC_OK) throw Error(status, functions_.last_error());
  }

 private:
  qc_library functions_;
};

}  // namespace detail

/// Inputs' shapes by name: extents in elements, outermost first.
using Shapes = std::map<std::string, std::vector<std::int64_t>>;

/// How a session runs.
struct Options {
  int threads = 1;  ///< threads of one run: the caller's and threads - 1 workers
};

/// A network input or output of a session. Cheap to copy; valid as long as the session's memory, wherever the Session object moves. Its shape is the one that
/// the session has now.
class Tensor {
 public:
  std::string name() const { return info_->name; }
  qc_dtype dtype() const noexcept { return info_->dtype; }
  /// Extents in elements, outermost first; empty for a scalar.
  std::vector<std::int64_t> shape() const { return {info_->shape, info_->shape + info_->rank}; }
  /// Elements in all.
  std::size_t size() const noexcept {
    std::size_t count = 1;
    for (int i = 0; i < info_->rank; ++i) count *= static_cast<std::size_t>(info_->shape[i]);
    return count;
  }
  std::size_t bytes() const noexcept { return info_->bytes; }
  /// Quantization of the first (for an output: last) 8-bit value behind this port: real = scale * (q - zero_point). Scale 0: there is none.
  float scale() const noexcept { return info_->scale; }
  std::int32_t zero_point() const noexcept { return info_->zero_point; }

  /// Is it an input that the session keeps from run to run (compiled with --state)? It needs not be set; writing to it starts a stream elsewhere.
  bool is_state() const noexcept { return state_; }

  /// The `size()` elements. Input: the session's own buffer (64-byte aligned), bound by this call. Output: the buffer that runs write to.
  /// Throws Error(QC_ERROR_ARGUMENT) when T is not the tensor's element type, Error(QC_ERROR_STATE) where the session pads this tensor (Session::fit).
  template <class T>
  T* data() {
    expect<T>();
    return static_cast<T*>(raw_data());
  }
  /// The same, whatever the element type: `bytes()` bytes.
  void* raw_data() {
    void* pointer = nullptr;
    const auto buffer = output_ ? (*library_)->session_output_buffer : (*library_)->session_input_buffer;
    library_->check(buffer(session_, info_->name, &pointer));
    return pointer;
  }

  /// Copy `size()` elements in; the source may have any alignment. Padded as the library's rules say, where the session pads this tensor.
  template <class T>
  void copy_from(const T* source) {
    expect<T>();
    if (!source) throw Error(QC_ERROR_ARGUMENT, "'" + name() + "': the source is null");
    copy_bytes_from(source);
  }
  /// The same, whatever the element type: `bytes()` bytes.
  void copy_bytes_from(const void* source) {
    if (output_ || !(*library_)->session_write) std::memcpy(raw_data(), source, bytes());
    else library_->check((*library_)->session_write(session_, info_->name, source, bytes()));
  }
  /// Copy in from a contiguous container; throws Error(QC_ERROR_SIZE) when its size is not the tensor's.
  template <class C>
  auto copy_from(const C& source) -> decltype(source.data(), void()) {
    if (source.size() != size())
      throw Error(QC_ERROR_SIZE, "'" + name() + "' has " + std::to_string(size()) + " elements, the source " + std::to_string(source.size()));
    copy_from(source.data());
  }
  /// The same, and the shape is checked too.
  template <class T>
  void copy_from(const T* source, const std::vector<std::int64_t>& source_shape) {
    if (source_shape != shape()) throw Error(QC_ERROR_SIZE, "'" + name() + "' has shape " + text(shape()) + ", the source " + text(source_shape));
    copy_from(source);
  }
  /// Copy the tensor out; of a padded output what belongs to the caller's input.
  template <class T>
  std::vector<T> to_vector() {
    expect<T>();
    std::unique_ptr<T[]> copy(new T[size()]);  // a std::vector<bool> has no array
    copy_bytes_to(copy.get());
    return {copy.get(), copy.get() + size()};
  }
  /// The same, whatever the element type: `bytes()` bytes.
  void copy_bytes_to(void* destination) {
    if (!output_ || !(*library_)->session_read) std::memcpy(destination, raw_data(), bytes());
    else library_->check((*library_)->session_read(session_, info_->name, destination, bytes()));
  }

  /// Zero copy: use the caller's `count` elements, aligned to their type, from the next run on. They stay the caller's and must outlive the session
  /// or the next bind. Inputs may be const.
  template <class T>
  void bind(T* elements, std::size_t count) {
    expect<T>();
    if (!output_) {
      library_->check((*library_)->session_bind_input(session_, info_->name, elements, count * sizeof(T)));
    } else if constexpr (std::is_const_v<T>) {
      throw Error(QC_ERROR_ARGUMENT, "'" + name() + "' is an output: its buffer can't be const");
    } else {
      library_->check((*library_)->session_bind_output(session_, info_->name, elements, count * sizeof(T)));
    }
  }

  /// A shape as people write it: [1, 3, 224, 224].
  static std::string text(const std::vector<std::int64_t>& extents) {
    std::string result = "[";
    for (std::size_t i = 0; i < extents.size(); ++i) result += (i ? ", " : "") + std::to_string(extents[i]);
    return result + "]";
  }

 private:
  friend class Session;
  Tensor(const detail::Library* library, qc_session* session, const qc_tensor_info* info, bool output, bool state)
      : library_(library), session_(session), info_(info), output_(output), state_(state) {}
  template <class T>
  void expect() const {
    if (detail::dtype_of<T>() != info_->dtype) throw Error(QC_ERROR_ARGUMENT, "'" + name() + "' has another element type than asked for");
  }
  const detail::Library* library_;
  qc_session* session_;
  const qc_tensor_info* info_;
  bool output_;
  bool state_;
};

/// A loaded network. Move-only. One call at a time per session; sessions of one file share its code and weights, and run in parallel.
class Session {
 public:
  /// Open the library at `path`. Throws Error: QC_ERROR_LIBRARY, QC_ERROR_DEVICE, QC_ERROR_ARGUMENT (threads), QC_ERROR_MEMORY.
  explicit Session(const std::string& path, Options options = {}) : Session(std::make_shared<detail::Library>(path), options) {}
  /// A session on the one library that is linked to this program.
  static Session linked(Options options = {}) { return linked(qc_library_linked(), options); }

  /// A session on a network that is linked to this program as a static archive: `library` is what its function qc_library_NAME returned.
  static Session linked(const qc_library& library, Options options = {}) { return Session(std::make_shared<detail::Library>(library), options); }
  /// Another session on the same library, with memory and threads of its own, for another thread.
  Session another(Options options = {}) const { return Session(library_, options); }

  ~Session() { close(); }
  Session(Session&& other) noexcept : library_(std::move(other.library_)), session_(std::exchange(other.session_, nullptr)) {}
  Session& operator=(Session&& other) noexcept {
    if (this != &other) {
      close();
      library_ = std::move(other.library_);
      session_ = std::exchange(other.session_, nullptr);
    }
    return *this;
  }

  std::vector<Tensor> inputs() { return ports((*library_)->input_count(), false); }
  std::vector<Tensor> outputs() { return ports((*library_)->output_count(), true); }
  /// The port of that name. Throws Error(QC_ERROR_NAME), listing the names there are.
  Tensor input(const std::string& name) { return port(name, inputs(), "input"); }
  Tensor output(const std::string& name) { return port(name, outputs(), "output"); }

  /// The shapes that the library was compiled for: of each the inputs' shapes by name.
  std::vector<Shapes> shapes() const {
    std::vector<Shapes> all(static_cast<std::size_t>((*library_)->shape_count ? (*library_)->shape_count() : 1));
    for (std::size_t i = 0; i < all.size(); ++i)
      for (int p = 0; p < (*library_)->input_count(); ++p) {
        const qc_tensor_info* info = (*library_)->shape_count ? (*library_)->shape_input_info(static_cast<std::int32_t>(i), p) : (*library_)->input_info(p);
        all[i][info->name] = {info->shape, info->shape + info->rank};
      }
    return all;
  }
  /// Run from now on at the shapes that the caller has for these inputs: compiled ones, or such as the library's rules pad to one. Every tensor has then the
  /// shape that belongs to them; set all inputs, and bind or ask for all buffers, again.
  /// Throws Error: QC_ERROR_SIZE, listing the compiled shapes, QC_ERROR_NAME, QC_ERROR_ARGUMENT; nothing changes then.
  void fit(const Shapes& shapes) {
    std::vector<qc_shape> given;
    for (const auto& [name, extents] : shapes) {
      if (extents.size() > QC_MAX_RANK) throw Error(QC_ERROR_SIZE, "'" + name + "' has more than " + std::to_string(QC_MAX_RANK) + " dimensions");
      qc_shape shape{name.c_str(), static_cast<std::int32_t>(extents.size()), {}};
      for (std::size_t a = 0; a < extents.size(); ++a) shape.shape[a] = extents[a];
      given.push_back(shape);
    }
    if ((*library_)->session_fit) {
      library_->check((*library_)->session_fit(session_, given.data(), static_cast<std::int32_t>(given.size())));
      return;
    }
    for (const auto& [name, extents] : shapes)  // a library of the first versions has one shape
      if (input(name).shape() != extents)
        throw Error(QC_ERROR_SIZE, "'" + name + "' has shape " + Tensor::text(input(name).shape()) + ", not " + Tensor::text(extents));
  }

  /// Run the network on the inputs as they are now. Throws Error(QC_ERROR_STATE) when one was never set, Error(QC_ERROR_BUSY) while another thread is inside.
  void run() { library_->check((*library_)->session_run(session_)); }
  /// Make the states that the session keeps from run to run what they were in the first one, as for a new stream.
  void reset() {
    if ((*library_)->session_reset) library_->check((*library_)->session_reset(session_));  // a library of the first versions has no states
  }

  /// Run steps [begin, end) of the manifest on memory of the caller's, for tracing: qc_session_execute says how it must be aligned. `inputs` and `outputs` are
  /// those of the session. Throws Error.
  void execute(void* workspace, int begin, int end) {
    const auto [in, out] = pointers();
    library_->check((*library_)->session_execute(session_, workspace, nullptr, in.data(), out.data(), begin, end));
  }
  /// The same for all steps; seconds of each.
  std::vector<double> profile(void* workspace) {
    const auto [in, out] = pointers();
    std::vector<double> seconds(static_cast<std::size_t>(steps()) + 1);
    library_->check((*library_)->session_profile(session_, workspace, nullptr, in.data(), out.data(), 0, steps(), seconds.data()));
    seconds.pop_back();
    return seconds;
  }
  std::size_t workspace_bytes() const { return (*library_)->workspace_bytes(); }
  /// Steps of a run at the compiled shape that the session has now (Session::fit); of the first one where it pads.
  int steps() const {
    for (std::int32_t shape = 1; (*library_)->shape_count && shape < (*library_)->shape_count(); ++shape)
      if (has_shape(shape)) return (*library_)->shape_step_count(shape);
    return (*library_)->step_count();
  }

  /// Run the library's test vectors. Throws Error: QC_ERROR_SELFTEST when this machine computes wrongly, QC_ERROR_STATE when there are none.
  void selftest() const {
    if (!(*library_)->selftest) throw Error(QC_ERROR_STATE, "this library has no test vectors; compile it with --selftest 2");
    library_->check((*library_)->selftest());
  }

  /// The row of targets.yaml that the library was compiled for.
  std::string target() const { return (*library_)->target_name(); }
  /// The whole manifest, JSON.
  std::string manifest() const {
    std::size_t length = 0;
    const char* text = (*library_)->manifest_json(&length);
    return {text, length};
  }

 private:
  Session(std::shared_ptr<detail::Library> library, Options options) : library_(std::move(library)) {
    library_->check((*library_)->session_create(options.threads, &session_));
  }
  /// Buffers of the inputs and outputs, in order; one element more, so that there is one.
  std::pair<std::vector<const void*>, std::vector<void*>> pointers() {
    std::pair<std::vector<const void*>, std::vector<void*>> all;
    for (Tensor tensor : inputs()) all.first.push_back(tensor.raw_data());
    for (Tensor tensor : outputs()) all.second.push_back(tensor.raw_data());
    all.first.push_back(nullptr);
    all.second.push_back(nullptr);
    return all;
  }
  void close() noexcept {
    if (session_) (*library_)->session_destroy(session_);
    session_ = nullptr;
  }
  std::vector<Tensor> ports(int count, bool output) {
    std::vector<Tensor> all;
    for (int i = 0; i < count; ++i) all.push_back(Tensor(library_.get(), session_, info(i, output), output, !output && is_state(i)));
    return all;
  }
  bool has_shape(std::int32_t shape) const {
    for (std::int32_t i = 0; i < (*library_)->input_count(); ++i) {
      const qc_tensor_info *own = info(i, false), *its = (*library_)->shape_input_info(shape, i);
      if (std::memcmp(own->shape, its->shape, static_cast<std::size_t>(its->rank) * sizeof(std::int64_t)) != 0) return false;
    }
    return true;
  }
  bool is_state(int input) const { return (*library_)->input_state && (*library_)->input_state(input) >= 0; }
  const qc_tensor_info* info(int index, bool output) const {
    if ((*library_)->session_input_info)
      return output ? (*library_)->session_output_info(session_, index) : (*library_)->session_input_info(session_, index);
    return output ? (*library_)->output_info(index) : (*library_)->input_info(index);
  }
  static Tensor port(const std::string& name, const std::vector<Tensor>& all, const char* what) {
    std::string known;
    for (const Tensor& tensor : all) {
      if (tensor.name() == name) return tensor;
      known += (known.empty() ? "'" : ", '") + tensor.name() + "'";
    }
    throw Error(QC_ERROR_NAME, std::string("there is no ") + what + " '" + name + "'; known: " + known);
  }
  std::shared_ptr<detail::Library> library_;
  qc_session* session_ = nullptr;
};

}  // namespace qcompiler
