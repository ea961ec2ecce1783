/* The network of this bundle for Java and Kotlin: the native half of Network.java, which says what the functions do. The network is linked to this library, so
 * that both are found wherever the system unpacks an app, or in the package itself. Replace the class by one of your own: the names below are its name.
 */
#include <jni.h>
#include <stdint.h>

#include "qcompiler/qcompiler.h"

static void complain(JNIEnv* env, const char* kind, const char* text) {
  jclass exception = (*env)->FindClass(env, kind);
  if (exception) (*env)->ThrowNew(env, exception, text);
}

/* Whether all is well; an exception is pending otherwise. */
static int fine(JNIEnv* env, qc_status status) {
  if (status != QC_OK) complain(env, "java/lang/IllegalStateException", qc_last_error());
  return status == QC_OK;
}

static qc_session* session_of(jlong handle) { return (qc_session*)(intptr_t)handle; }

JNIEXPORT jlong JNICALL Java_qcompiler_Network_open(JNIEnv* env, jclass class_, jint threads) {
  qc_session* session = 0;
  (void)class_;
  return fine(env, qc_session_create(threads, &session)) ? (jlong)(intptr_t)session : 0;
}

JNIEXPORT void JNICALL Java_qcompiler_Network_destroy(JNIEnv* env, jclass class_, jlong handle) {
  (void)env, (void)class_;
  qc_session_destroy(session_of(handle));
}

/* Copy an array into the session's own buffer of an input. */
static int put(JNIEnv* env, qc_session* session, const qc_tensor_info* info, jfloatArray values) {
  void* data;
  if (info->dtype != QC_FLOAT32) return complain(env, "java/lang/IllegalArgumentException", "an input of the network is not float32"), 0;
  if (!values || (size_t)(*env)->GetArrayLength(env, values) * sizeof(float) != info->bytes)
    return complain(env, "java/lang/IllegalArgumentException", "an input has another number of elements than the network's"), 0;
  if (!fine(env, qc_session_input_buffer(session, info->name, &data))) return 0;
  (*env)->GetFloatArrayRegion(env, values, 0, (*env)->GetArrayLength(env, values), data);
  return !(*env)->ExceptionCheck(env);
}

/* An output as an array; null where an exception is pending. */
static jfloatArray get(JNIEnv* env, qc_session* session, const qc_tensor_info* info) {
  void* data;
  if (info->dtype != QC_FLOAT32) return complain(env, "java/lang/IllegalArgumentException", "an output of the network is not float32"), (jfloatArray)0;
  if (!fine(env, qc_session_output_buffer(session, info->name, &data))) return 0;
  jsize count = (jsize)(info->bytes / sizeof(float));
  jfloatArray values = (*env)->NewFloatArray(env, count);
  if (values) (*env)->SetFloatArrayRegion(env, values, 0, count, data);
  return values;
}

JNIEXPORT jobjectArray JNICALL Java_qcompiler_Network_run(JNIEnv* env, jclass class_, jlong handle, jobjectArray inputs) {
  qc_session* session = session_of(handle);
  (void)class_;
  if (!inputs || (*env)->GetArrayLength(env, inputs) != qc_input_count())
    return complain(env, "java/lang/IllegalArgumentException", "another number of inputs than the network's"), (jobjectArray)0;
  for (int32_t i = 0; i < qc_input_count(); ++i) {
    jfloatArray values = (jfloatArray)(*env)->GetObjectArrayElement(env, inputs, i);
    int kept = !values && qc_input_state(i) >= 0;
    int done = kept || put(env, session, qc_input_info(i), values);
    (*env)->DeleteLocalRef(env, values);
    if (!done) return 0;
  }
  jclass floats = (*env)->FindClass(env, "[F");
  jobjectArray outputs = floats ? (*env)->NewObjectArray(env, qc_output_count(), floats, 0) : 0;
  if (!outputs || !fine(env, qc_session_run(session))) return 0;
  for (int32_t i = 0; i < qc_output_count(); ++i) {
    jfloatArray values = get(env, session, qc_output_info(i));
    if (!values) return 0;
    (*env)->SetObjectArrayElement(env, outputs, i, values);
    (*env)->DeleteLocalRef(env, values);
  }
  return outputs;
}
