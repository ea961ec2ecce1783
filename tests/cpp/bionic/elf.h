#pragma once
enum { EM_ARM = 40, EM_X86_64 = 62, EM_AARCH64 = 183 };
#define ELFMAG "\177ELF"
#define SELFMAG 4
