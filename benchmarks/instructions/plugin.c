/* A plugin for qemu's user mode: counts the instructions of the emulated program, and prints the count at each system call getppid (173 on aarch64),
 * which the programs beside this file use as their marker. Declares the few functions of qemu's plugin interface that it needs. */
#include <inttypes.h>
#include <stddef.h>
#include <stdio.h>

#define PUBLIC __attribute__((visibility("default")))
enum { MARKER = 173, NO_REGISTERS = 0 };
struct block;

void qemu_plugin_register_vcpu_tb_trans_cb(uint64_t id, void (*translated)(uint64_t id, struct block*));
void qemu_plugin_register_vcpu_tb_exec_cb(struct block*, void (*executed)(unsigned cpu, void* data), int registers, void* data);
void qemu_plugin_register_vcpu_syscall_cb(uint64_t id, void (*called)(uint64_t id, unsigned cpu, int64_t number, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t,
                                                                      uint64_t, uint64_t, uint64_t));
size_t qemu_plugin_tb_n_insns(const struct block*);

PUBLIC int qemu_plugin_version = 1;
static uint64_t count;

static void executed(unsigned cpu, void* instructions) {
  (void)cpu;
  count += (uint64_t)(uintptr_t)instructions;
}

static void translated(uint64_t id, struct block* block) {
  (void)id;
  qemu_plugin_register_vcpu_tb_exec_cb(block, executed, NO_REGISTERS, (void*)(uintptr_t)qemu_plugin_tb_n_insns(block));
}

static void called(uint64_t id, unsigned cpu, int64_t number, uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t e, uint64_t f, uint64_t g, uint64_t h) {
  (void)id, (void)cpu, (void)a, (void)b, (void)c, (void)d, (void)e, (void)f, (void)g, (void)h;
  if (number == MARKER) fprintf(stderr, "instructions %" PRIu64 "\n", count);
}

PUBLIC int qemu_plugin_install(uint64_t id, const void* info, int words, char** word) {
  (void)info, (void)words, (void)word;
  qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
  qemu_plugin_register_vcpu_syscall_cb(id, called);
  return 0;
}
