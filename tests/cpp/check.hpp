// What the C++ tests say and count: a line for each expectation, and `failures` of them.
#pragma once

#include <atomic>
#include <cstdio>
#include <functional>
#include <string>

#include "qcompiler/qcompiler.hpp"

static std::atomic<int> failures{0};

static void expect(bool condition, const std::string& what) {
  std::printf("%s: %s\n", condition ? "ok" : "FAILED", what.c_str());
  failures += !condition;
}

static void throws(qc_status code, const char* fragment, const std::function<void()>& call) {
  try {
    call();
    expect(false, fragment);
  } catch (const qcompiler::Error& error) {
    expect(error.code() == code && std::string(error.what()).find(fragment) != std::string::npos, error.what());
  }
}
