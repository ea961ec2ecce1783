/// C++17 interface of a library compiled by qcompiler: header only, over the C interface beside it.
///
///     qcompiler::Session session("model.so", {.threads = 2});   // {2} before C++20
///     session.input("input").copy_from(pixels);                 // or bind(): zero copy
///     session.run();
///     const float* logits = session.output("logits").data<float>();
///
/// Link with -ldl where dlopen is not in libc. Errors are exceptions of type qcompiler::Error; its code() is a qc_status.
#pragma once

#include <dlfcn.h>

#include <cstring>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

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
  else if constexpr (std::is_same_v<U, bool>) return QC_BOOL;
  else if constexpr (std::is_same_v<U, double>) return QC_FLOAT64;
  else static_assert(!sizeof(U), "element type without a qc_dtype");
}

/// An open library and its C functions. Shared by all sessions on it; closed with the last.
class Library {
 public:
  explicit Library(const std::string& path) : handle_(dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) {
    if (!handle_) throw Error(QC_ERROR_LIBRARY, path + ": can't be loaded: " + dlerror());
    try {
      load(abi_version, "qc_abi_version", path);
      if (abi_version() != QC_ABI_VERSION)
        throw Error(QC_ERROR_LIBRARY, path + ": has ABI version " + std::to_string(abi_version()) + ", this header is version " + std::to_string(QC_ABI_VERSION));
      load(last_error, "qc_last_error", path);
      load(manifest_json, "qc_manifest_json", path);
      load(target_name, "qc_target_name", path);
      load(input_count, "qc_input_count", path);
      load(output_count, "qc_output_count", path);
      load(input_info, "qc_input_info", path);
      load(output_info, "qc_output_info", path);
      load(create, "qc_session_create", path);
      load(destroy, "qc_session_destroy", path);
      load(bind_input, "qc_session_bind_input", path);
      load(bind_output, "qc_session_bind_output", path);
      load(input_buffer, "qc_session_input_buffer", path);
      load(output_buffer, "qc_session_output_buffer", path);
      load(run, "qc_session_run", path);
    } catch (...) {
      dlclose(handle_);
      throw;
    }
  }
  ~Library() { dlclose(handle_); }
  Library(const Library&) = delete;
  Library& operator=(const Library&) = delete;

  void check(qc_status status) const {
    if (status != QC_OK) throw Error(status, last_error());
  }

  decltype(&qc_abi_version) abi_version;
  decltype(&qc_last_error) last_error;
  decltype(&qc_manifest_json) manifest_json;
  decltype(&qc_target_name) target_name;
  decltype(&qc_input_count) input_count;
  decltype(&qc_output_count) output_count;
  decltype(&qc_input_info) input_info;
  decltype(&qc_output_info) output_info;
  decltype(&qc_session_create) create;
  decltype(&qc_session_destroy) destroy;
  decltype(&qc_session_bind_input) bind_input;
  decltype(&qc_session_bind_output) bind_output;
  decltype(&qc_session_input_buffer) input_buffer;
  decltype(&qc_session_output_buffer) output_buffer;
  decltype(&qc_session_run) run;

 private:
  template <class F>
  void load(F& function, const char* symbol, const std::string& path) {
    function = reinterpret_cast<F>(dlsym(handle_, symbol));
    if (!function) throw Error(QC_ERROR_LIBRARY, path + ": not a library that qcompiler made (no symbol " + symbol + ")");
  }
  void* handle_;
};

}  // namespace detail

/// Threads of one run: the caller's and threads - 1 workers.
struct Options {
  int threads = 1;
};

/// A network input or output of a session. Valid as long as the session; cheap to copy.
class Tensor {
 public:
  const std::string name() const { return info_->name; }
  qc_dtype dtype() const noexcept { return info_->dtype; }
  std::vector<std::int64_t> shape() const { return {info_->shape, info_->shape + info_->rank}; }
  std::size_t bytes() const noexcept { return info_->bytes; }
  /// Quantization of the 8-bit value behind this port (real = scale * (q - zero_point)); scale is 0 when there is none.
  float scale() const noexcept { return info_->scale; }
  std::int32_t zero_point() const noexcept { return info_->zero_point; }

  /// The session's own buffer (64-byte aligned), `size()` elements. Throws when T is not the tensor's element type.
  template <class T>
  T* data() {
    expect<T>();
    void* pointer = nullptr;
    library_->check((output_ ? library_->output_buffer : library_->input_buffer)(session_, info_->name, &pointer));
    return static_cast<T*>(pointer);
  }
  std::size_t size() const noexcept {
    std::size_t count = 1;
    for (int i = 0; i < info_->rank; ++i) count *= static_cast<std::size_t>(info_->shape[i]);
    return count;
  }

  /// Copy `size()` elements in; the source may have any alignment.
  template <class T>
  void copy_from(const T* source) {
    std::memcpy(data<T>(), source, bytes());
  }
  /// Copy in from a contiguous container; throws when its size is not the tensor's.
  template <class C>
  auto copy_from(const C& source) -> decltype(source.data(), void()) {
    if (source.size() != size())
      throw Error(QC_ERROR_SIZE, "'" + name() + "' has " + std::to_string(size()) + " elements, the source " + std::to_string(source.size()));
    copy_from(source.data());
  }
  /// Copy the tensor out.
  template <class T>
  std::vector<T> to_vector() {
    const T* begin = data<T>();
    return {begin, begin + size()};
  }

  /// Zero copy: use the caller's `count` elements from the next run on. They stay the caller's and must outlive the session or the next bind.
  template <class T>
  void bind(T* elements, std::size_t count) {
    expect<T>();
    if (output_) {
      if constexpr (std::is_const_v<T>) throw Error(QC_ERROR_ARGUMENT, "'" + name() + "' is an output: its buffer can't be const");
      else library_->check(library_->bind_output(session_, info_->name, elements, count * sizeof(T)));
    } else {
      library_->check(library_->bind_input(session_, info_->name, elements, count * sizeof(T)));
    }
  }

 private:
  friend class Session;
  Tensor(const detail::Library* library, qc_session* session, const qc_tensor_info* info, bool output)
      : library_(library), session_(session), info_(info), output_(output) {}
  template <class T>
  void expect() const {
    if (detail::dtype_of<T>() != info_->dtype) throw Error(QC_ERROR_ARGUMENT, "'" + name() + "' has another element type than asked for");
  }
  const detail::Library* library_;
  qc_session* session_;
  const qc_tensor_info* info_;
  bool output_;
};

/// A loaded network. Move-only. One run at a time per session; sessions of one file share its code and weights.
class Session {
 public:
  explicit Session(const std::string& path, Options options = {}) : library_(std::make_shared<detail::Library>(path)) {
    library_->check(library_->create(options.threads, &session_));
  }
  ~Session() {
    if (session_) library_->destroy(session_);
  }
  Session(Session&& other) noexcept : library_(std::move(other.library_)), session_(std::exchange(other.session_, nullptr)) {}
  Session& operator=(Session&& other) noexcept {
    std::swap(library_, other.library_);
    std::swap(session_, other.session_);
    return *this;
  }

  std::vector<Tensor> inputs() { return ports(library_->input_count(), library_->input_info, false); }
  std::vector<Tensor> outputs() { return ports(library_->output_count(), library_->output_info, true); }
  Tensor input(const std::string& name) { return port(name, inputs(), "input"); }
  Tensor output(const std::string& name) { return port(name, outputs(), "output"); }

  /// Run the network on the inputs as they are now.
  void run() { library_->check(library_->run(session_)); }

  /// The target the library was compiled for, and its whole manifest as JSON.
  std::string target() const { return library_->target_name(); }
  std::string manifest() const {
    std::size_t length = 0;
    const char* text = library_->manifest_json(&length);
    return {text, length};
  }

 private:
  template <class Info>
  std::vector<Tensor> ports(int count, Info info, bool output) {
    std::vector<Tensor> all;
    for (int i = 0; i < count; ++i) all.push_back(Tensor(library_.get(), session_, info(i), output));
    return all;
  }
  Tensor port(const std::string& name, const std::vector<Tensor>& all, const char* what) {
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
