// A plugin for ONNX Runtime that passes everything on to the OpenVINO plugin in the environment variable OPENVINO_EP, but
// tells it that every device is Intel's. OpenVINO runs on CPUs of other vendors, too; its plugin does not offer them.
// OrtApi is a table of functions to which each version appends: onnxruntime/include/onnxruntime/core/session/
// onnxruntime_c_api.h. More is copied than the table has; what follows it in memory is never read.

typedef unsigned long size;
struct base {
  void **(*api)(unsigned version);
  const char *(*version)(void);
};
void *dlopen(const char *, int), *dlsym(void *, const char *), *memcpy(void *, const void *, size);
char *getenv(const char *);

enum { LAZY = 1, VENDOR_ID = 308, COPIED = 512, INTEL = 0x8086 };
static const struct base *original;
static void *functions[COPIED];

static unsigned vendor_id(const void *device) { return INTEL; }

static void **api(unsigned version) {
  void **given = original->api(version);
  if (!given) return given; // this ONNX Runtime is older than the plugin
  memcpy(functions, given, sizeof functions);
  functions[VENDOR_ID] = vendor_id;
  return functions;
}

static void *of_plugin(const char *function) { return dlsym(dlopen(getenv("OPENVINO_EP"), LAZY), function); }

void *CreateEpFactories(const char *name, const struct base *given, const void *logger, void **factories, size most,
                        size *found) {
  static struct base changed;
  void *(*create)(const char *, const struct base *, const void *, void **, size, size *) =
      of_plugin("CreateEpFactories");
  original = given;
  changed = (struct base){api, given->version};
  return create(name, &changed, logger, factories, most, found);
}

void *ReleaseEpFactory(void *factory) {
  void *(*release)(void *) = of_plugin("ReleaseEpFactory");
  return release(factory);
}
