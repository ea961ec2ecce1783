/* In the place of a Java machine: arrays, and the functions that qc_jni.c calls, to run the network through it. */
#include <jni.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
struct object { jsize length; jobject* items; float* values; };
static char said[256];
static jobject new_object(jsize length) { jobject o = calloc(1, sizeof *o); return o->length = length, o->items = calloc(length + 1, 8), o->values = calloc(length + 1, 4), o; }
static jclass find_class(JNIEnv* e, const char* name) { (void)e; snprintf(said, 40, "%s: ", strchr(name, '/') ? name : ""); return new_object(0); }
static jint throw_new(JNIEnv* e, jclass c, const char* text) { (void)e, (void)c; strncat(said, text, 200); return 0; }
static jboolean check(JNIEnv* e) { (void)e; return 0; }
static jsize length(JNIEnv* e, jarray a) { (void)e; return a->length; }
static jobject element(JNIEnv* e, jobjectArray a, jsize i) { (void)e; return a->items[i]; }
static void set_element(JNIEnv* e, jobjectArray a, jsize i, jobject o) { (void)e; a->items[i] = o; }
static jobjectArray objects(JNIEnv* e, jsize n, jclass c, jobject o) { (void)e, (void)c, (void)o; return new_object(n); }
static jfloatArray floats(JNIEnv* e, jsize n) { (void)e; return new_object(n); }
static void get_region(JNIEnv* e, jfloatArray a, jsize from, jsize n, jfloat* to) { (void)e; memcpy(to, a->values + from, n * 4u); }
static void set_region(JNIEnv* e, jfloatArray a, jsize from, jsize n, const jfloat* v) { (void)e; memcpy(a->values + from, v, n * 4u); }
static void forget(JNIEnv* e, jobject o) { (void)e, (void)o; }
static const struct functions all = {find_class, throw_new, check, length, element, set_element, objects, floats, get_region, set_region, forget};
jlong Java_qcompiler_Network_open(JNIEnv*, jclass, jint);
void Java_qcompiler_Network_destroy(JNIEnv*, jclass, jlong);
jobjectArray Java_qcompiler_Network_run(JNIEnv*, jclass, jlong, jobjectArray);
int main(void) {
  JNIEnv env = &all;
  if (Java_qcompiler_Network_open(&env, 0, -1)) return 1;
  puts(said);
  jlong network = Java_qcompiler_Network_open(&env, 0, 2);
  jobject inputs = new_object(1), image = inputs->items[0] = new_object(256);
  for (int i = 0; i < 256; ++i) image->values[i] = (float)(i % 17) / 16;
  inputs->length = 2;
  if (Java_qcompiler_Network_run(&env, 0, network, inputs)) return 2;
  puts(said);
  inputs->length = 1, image->length = 255;
  if (Java_qcompiler_Network_run(&env, 0, network, inputs)) return 3;
  puts(said);
  image->length = 256;
  jobject outputs = Java_qcompiler_Network_run(&env, 0, network, inputs);
  for (int i = 0; i < outputs->items[0]->length; ++i) printf("%.9g\n", (double)outputs->items[0]->values[i]);
  Java_qcompiler_Network_destroy(&env, 0, network);
  return 0;
}
