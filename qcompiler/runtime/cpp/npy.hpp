// Reads and writes .npy files (NumPy's format, versions 1 to 3): C-order arrays of the types that a compiled network's ports have.
#pragma once

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "qcompiler/qcompiler.h"

namespace npy {

struct Array {
  qc_dtype dtype;
  std::vector<std::int64_t> shape;
  std::vector<char> data;  // row-major elements, little-endian
};

struct Type {
  qc_dtype dtype;
  const char* descr;  // without the byte order
  std::size_t bytes;
};

inline const std::vector<Type>& types() {
  static const std::vector<Type> all = {{QC_FLOAT32, "f4", 4}, {QC_INT8, "i1", 1},    {QC_UINT8, "u1", 1}, {QC_INT32, "i4", 4},  {QC_INT64, "i8", 8},
                                        {QC_BOOL, "b1", 1},    {QC_FLOAT64, "f8", 8}, {QC_INT16, "i2", 2}, {QC_FLOAT16, "f2", 2},
                                        {QC_UINT16, "u2", 2},  {QC_UINT32, "u4", 4},  {QC_UINT64, "u8", 8}};
  return all;
}

inline const Type& type_of(qc_dtype dtype) {
  for (const Type& type : types())
    if (type.dtype == dtype) return type;
  throw std::logic_error("a qc_dtype without a NumPy type");
}

/// A whole file. Throws std::runtime_error with a sentence.
inline std::vector<char> read_bytes(const std::string& path) {
  std::FILE* file = std::fopen(path.c_str(), "rb");
  if (!file) throw std::runtime_error(path + ": can't be opened: " + std::strerror(errno));
  std::vector<char> bytes;
  char block[65536];
  for (std::size_t got; (got = std::fread(block, 1, sizeof block, file)) > 0;) bytes.insert(bytes.end(), block, block + got);
  const int failed = std::ferror(file) ? errno : 0;
  std::fclose(file);
  if (failed) throw std::runtime_error(path + ": can't be read: " + std::strerror(failed));
  return bytes;
}

/// What follows `'key':` in the header (a Python dictionary), up to and without the first character of `ends` behind it; empty when there is none.
inline std::string field(const std::string& header, const std::string& key, const char* ends) {
  const std::size_t found = header.find("'" + key + "':");
  if (found == std::string::npos) return "";
  const std::size_t begin = header.find_first_not_of(" ('", found + key.size() + 3);
  if (begin == std::string::npos) return "";
  return header.substr(begin, header.find_first_of(ends, begin) - begin);
}

/// Read the array in `path`. Throws std::runtime_error with a sentence.
inline Array read(const std::string& path) {
  const auto refuse = [&](const std::string& why) { return std::runtime_error(path + ": " + why); };
  const std::vector<char> bytes = read_bytes(path);
  if (bytes.size() < 12 || std::memcmp(bytes.data(), "\x93NUMPY", 6) != 0) throw refuse("not an .npy file; write one with numpy.save");
  const int version = static_cast<unsigned char>(bytes[6]);
  if (version < 1 || version > 3) throw refuse(".npy version " + std::to_string(version) + "; supported: 1 to 3");
  const std::size_t start = version == 1 ? 10 : 12;
  std::size_t length = 0;
  for (std::size_t i = start; i-- > 8;) length = length << 8 | static_cast<unsigned char>(bytes[i]);
  if (length > bytes.size() - start) throw refuse("cut short within its header");
  const std::string header(bytes.data() + start, length);

  const std::string descr = field(header, "descr", "'");
  if (descr.size() < 3 || !std::strchr("<>|=", descr[0])) throw refuse("has structured or unknown elements; plain numbers are supported");
  Array array{};
  std::size_t element = 0;
  for (const Type& type : types())
    if (descr.substr(1) == type.descr) array.dtype = type.dtype, element = type.bytes;
  if (!element) throw refuse("elements of type " + descr + " are not supported");
  if (descr[0] == '>' && element > 1) throw refuse("big-endian; save it as little-endian");
  if (header.find("'shape': (") == std::string::npos) throw refuse("a header without a shape");
  std::size_t count = 1;
  const std::string extents = header.find("'shape': ()") == std::string::npos ? field(header, "shape", ")") : "";
  for (std::size_t at = 0; at < extents.size();) {
    const std::size_t end = std::min(extents.find(',', at), extents.size());
    const std::string digits = extents.substr(at, end - at);
    const std::size_t first = digits.find_first_not_of(' ');
    at = end + 1;
    if (first == std::string::npos) continue;  // behind the last comma
    if (digits.size() - first > 15 || digits.find_first_not_of("0123456789", first) != std::string::npos) throw refuse("a shape of (" + extents + ")");
    array.shape.push_back(std::stoll(digits.substr(first)));
    const auto extent = static_cast<std::size_t>(array.shape.back());
    if (extent && count > bytes.size() / extent) throw refuse("shorter than its shape (" + extents + ") says");
    count *= extent;
  }
  if (array.shape.size() > 1 && field(header, "fortran_order", ",}") != "False") throw refuse("in Fortran order; save numpy.ascontiguousarray of it");
  const std::size_t held = bytes.size() - start - length;
  if (held != count * element)
    throw refuse("holds " + std::to_string(held) + " bytes of elements, its shape needs " + std::to_string(count * element));
  array.data.assign(bytes.end() - static_cast<std::ptrdiff_t>(held), bytes.end());
  return array;
}

/// Write an array, beside `path` first and then renamed. Throws std::runtime_error with a sentence.
inline void write(const std::string& path, qc_dtype dtype, const std::vector<std::int64_t>& shape, const void* data, std::size_t size) {
  const Type& type = type_of(dtype);
  std::string header = std::string("{'descr': '") + (type.bytes == 1 ? "|" : "<") + type.descr + "', 'fortran_order': False, 'shape': (";
  for (std::int64_t extent : shape) header += std::to_string(extent) + ", ";
  if (shape.size() > 1) header.resize(header.size() - 2);
  header += "), }";
  header.resize((10 + header.size() + 1 + 63) / 64 * 64 - 10 - 1, ' ');  // elements start at a multiple of 64 bytes
  header += '\n';
  const char lead[10] = {'\x93', 'N', 'U', 'M', 'P', 'Y', 1, 0, static_cast<char>(header.size() & 255), static_cast<char>(header.size() >> 8)};
  const std::string temporary = path + ".part";
  std::FILE* file = std::fopen(temporary.c_str(), "wb");
  bool written = file && std::fwrite(lead, sizeof lead, 1, file) == 1 && std::fwrite(header.data(), header.size(), 1, file) == 1;
  written = written && (size == 0 || std::fwrite(data, size, 1, file) == 1);
  if (file && std::fclose(file) != 0) written = false;
  if (!written || std::rename(temporary.c_str(), path.c_str()) != 0) {
    const std::string why = std::strerror(errno);
    std::remove(temporary.c_str());
    throw std::runtime_error(path + ": can't be written: " + why);
  }
}

}  // namespace npy
