/* What qc_jni.c asks of a Java machine, as members of a table in no particular order. */
#pragma once
#include <stddef.h>
#include <stdint.h>
typedef int32_t jint; typedef int64_t jlong; typedef jint jsize; typedef float jfloat; typedef unsigned char jboolean;
typedef struct object* jobject; typedef jobject jclass; typedef jobject jarray; typedef jobject jobjectArray; typedef jobject jfloatArray;
typedef const struct functions* JNIEnv;
#define JNIEXPORT __attribute__((visibility("default")))
#define JNICALL
struct functions {
  jclass (*FindClass)(JNIEnv*, const char*);
  jint (*ThrowNew)(JNIEnv*, jclass, const char*);
  jboolean (*ExceptionCheck)(JNIEnv*);
  jsize (*GetArrayLength)(JNIEnv*, jarray);
  jobject (*GetObjectArrayElement)(JNIEnv*, jobjectArray, jsize);
  void (*SetObjectArrayElement)(JNIEnv*, jobjectArray, jsize, jobject);
  jobjectArray (*NewObjectArray)(JNIEnv*, jsize, jclass, jobject);
  jfloatArray (*NewFloatArray)(JNIEnv*, jsize);
  void (*GetFloatArrayRegion)(JNIEnv*, jfloatArray, jsize, jsize, jfloat*);
  void (*SetFloatArrayRegion)(JNIEnv*, jfloatArray, jsize, jsize, const jfloat*);
  void (*DeleteLocalRef)(JNIEnv*, jobject);
};
