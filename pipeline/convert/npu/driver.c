/* Compiles an OpenVINO IR and exports the blob, on Windows or under Wine, with the C API of the vendor's wheel.
 *
 * Usage: driver.exe MODEL.xml MODEL.blob DEVICE [KEY VALUE]...
 * Prints "openvino VERSION"; an error goes to standard error, with status 1.
 *
 * It starts without a C runtime of its own and takes the few functions below from Windows' ucrtbase.dll, because
 * building MinGW's runtime for it takes Zig two minutes.
 */
#include <corecrt_startup.h>
#include <stdio.h>
#include <stdlib.h>

#include "openvino/c/openvino.h"

#define MAX_PROPERTIES 32 /* keys and values together */

static void require(const char *step, ov_status_e status) {
  if (status == OK) return;
  fputs(step, stderr);
  fputs(" failed: ", stderr);
  fputs(status == INVALID_C_PARAM ? "invalid argument" : ov_get_last_err_msg(), stderr);
  fputs("\n", stderr);
  exit(1);
}

void start(void) {
  const char *p[MAX_PROPERTIES] = {0};
  ov_version_t version;
  ov_core_t *core = NULL;
  ov_compiled_model_t *model = NULL;

  _configure_narrow_argv(_crt_argv_unexpanded_arguments);
  if (__argc < 4 || __argc % 2 || __argc - 4 > MAX_PROPERTIES) {
    fputs("usage: driver MODEL.xml MODEL.blob DEVICE [KEY VALUE]..., at most 16 pairs\n", stderr);
    exit(2);
  }
  for (int i = 4; i < __argc; i++) p[i - 4] = __argv[i];
  require("reading the version", ov_get_openvino_version(&version));
  fputs("openvino ", stdout);
  puts(version.buildNumber);
  fflush(stdout);
  require("starting OpenVINO", ov_core_create(&core));
  /* Variadic, and C cannot build such a call at run time: the size says how many of these count. */
  require("compiling",
          ov_core_compile_model_from_file(core, __argv[1], __argv[3], __argc - 4, &model, p[0], p[1], p[2], p[3], p[4],
                                          p[5], p[6], p[7], p[8], p[9], p[10], p[11], p[12], p[13], p[14], p[15],
                                          p[16], p[17], p[18], p[19], p[20], p[21], p[22], p[23], p[24], p[25], p[26],
                                          p[27], p[28], p[29], p[30], p[31]));
  require("exporting", ov_compiled_model_export_model(model, __argv[2]));
  exit(0);
}
