#pragma once
#include <stdarg.h>
#include <sys/types.h>
typedef struct __sFILE FILE;
extern FILE *stdin, *stdout, *stderr;
int printf(const char*, ...);
int fprintf(FILE*, const char*, ...);
int snprintf(char*, size_t, const char*, ...);
int vsnprintf(char*, size_t, const char*, va_list);
int sscanf(const char*, const char*, ...);
int fscanf(FILE*, const char*, ...);
int puts(const char*);
int fputs(const char*, FILE*);
int fputc(int, FILE*);
FILE* fopen(const char*, const char*);
int fclose(FILE*);
size_t fread(void*, size_t, size_t, FILE*);
size_t fwrite(const void*, size_t, size_t, FILE*);
int ferror(FILE*);
int fflush(FILE*);
char* fgets(char*, int, FILE*);
