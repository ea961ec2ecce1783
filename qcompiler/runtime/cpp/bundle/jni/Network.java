package qcompiler;

/** The network of this bundle. One thread at a time may use an object; several objects share code and weights. */
public final class Network implements AutoCloseable {
  static {
    System.loadLibrary("qc_jni");
  }

  private long session;

  /** With this many threads for one run. Throws IllegalStateException where the CPU lacks what the network was compiled for. */
  public Network(int threads) {
    session = open(threads);
  }

  /** The outputs, in their order, of one run on all inputs, in theirs: dense and row-major, as the bundle's README.md lists them. Null for a state keeps
   * what the run before left in it. */
  public synchronized float[][] run(float[]... inputs) {
    if (session == 0) throw new IllegalStateException("the network is closed");
    return run(session, inputs);
  }

  @Override
  public synchronized void close() {
    destroy(session);
    session = 0;
  }

  private static native long open(int threads);

  private static native void destroy(long session);

  private static native float[][] run(long session, float[][] inputs);
}
