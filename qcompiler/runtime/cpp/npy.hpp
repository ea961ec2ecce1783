// Reads and writes .npy files (NumPy's format, versions 1 to 3): C-order arrays of the types that a compiled network's ports have.
#pragma once

#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <regex>
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
                                        {QC_BOOL, "b1", 1},    {QC_FLOAT64, "f8", 8}, {QC_INT16, "i2", 2}, {QC_FLOAT16, "f2", 2}};
  return all;
}

inline const Type& type_of(qc_dtype dtype) {
  for (const Type& type : types())
    if (type.dtype == dtype) return type;
  throw std::logic_error("a qc_dtype without a NumPy type");
}

/// Read the array in `path`. Throws std::runtime_error with a sentence.
inline Array read(const std::string& path) {
  const auto refuse = [&](const std::string& why) { return std::runtime_error(path + ": " + why); };
  std::ifstream file(path, std::ios::binary);
  if (!file) throw refuse(std::string("can't be opened: ") + std::strerror(errno));
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  if (bytes.size() < 12 || std::memcmp(bytes.data(), "\x93NUMPY", 6) != 0) throw refuse("not an .npy file; write one with numpy.save");
  const int version = static_cast<unsigned char>(bytes[6]);
  if (version < 1 || version > 3) throw refuse(".npy version " + std::to_string(version) + "; supported: 1 to 3");
  const std::size_t start = version == 1 ? 10 : 12;
  std::size_t length = 0;
  for (std::size_t i = start; i-- > 8;) length = length << 8 | static_cast<unsigned char>(bytes[i]);
  if (length > bytes.size() - start) throw refuse("cut short within its header");
  if (length > 10000) throw refuse("a header of " + std::to_string(length) + " bytes; an array of plain numbers has a short one");
  const std::string header(bytes.data() + start, length);

  std::smatch found;
  if (!std::regex_search(header, found, std::regex("'descr': *'([<>|=])([a-z][0-9]+)'"))) throw refuse("has structured or unknown elements; plain numbers are supported");
  const std::string order = found[1], descr = found[2];
  Array array{};
  std::size_t element = 0;
  for (const Type& type : types())
    if (descr == type.descr) array.dtype = type.dtype, element = type.bytes;
  if (!element) throw refuse("elements of type " + descr + " are not supported");
  if (order == ">" && element > 1) throw refuse("big-endian; save it as little-endian");
  if (!std::regex_search(header, found, std::regex("'shape': *\\(([0-9, ]*)\\)"))) throw refuse("a header without a shape");
  const std::string extents = found[1];
  const std::regex number("[0-9]+");
  std::size_t count = 1;
  for (std::sregex_iterator i(extents.begin(), extents.end(), number), end; i != end; ++i) {
    if (i->length() > 15) throw refuse("an extent of its shape is too large");
    array.shape.push_back(std::stoll(i->str()));
    const auto extent = static_cast<std::size_t>(array.shape.back());
    if (extent && count > bytes.size() / extent) throw refuse("shorter than its shape says");
    count *= extent;
  }
  if (array.shape.size() > 1 && std::regex_search(header, std::regex("'fortran_order': *True")))
    throw refuse("in Fortran order; save numpy.ascontiguousarray of it");
  if (bytes.size() - start - length != count * element)
    throw refuse("holds " + std::to_string(bytes.size() - start - length) + " bytes of elements, its shape needs " + std::to_string(count * element));
  array.data.assign(bytes.end() - static_cast<std::ptrdiff_t>(count * element), bytes.end());
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
  std::ofstream file(temporary, std::ios::binary);
  file.write(lead, sizeof lead);
  file.write(header.data(), static_cast<std::streamsize>(header.size()));
  file.write(static_cast<const char*>(data), static_cast<std::streamsize>(size));
  file.close();
  if (!file || std::rename(temporary.c_str(), path.c_str()) != 0) {
    const std::string why = std::strerror(errno);
    std::remove(temporary.c_str());
    throw std::runtime_error(path + ": can't be written: " + why);
  }
}

}  // namespace npy
