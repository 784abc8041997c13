/* Runs an ONNX model on DirectML with onnxruntime-genai's C API, under Wine.
 *
 * Usage: driver.exe MODEL-DIRECTORY PROMPTS LOGITS
 * PROMPTS holds, per prompt, int32 numbers: length, rows of logits wanted, tokens to generate, the prompt's ids. For
 * each, the logits of the last rows are appended to LOGITS, and "logits TYPE VOCABULARY" is printed (TYPE is ONNX's: 1
 * float, 10 float16), then "token ID" for each greedily generated one. An error goes to standard error, with status 1.
 *
 * Wine 10 makes Direct3D 12 devices on which DirectML cannot start. Devices share one table of methods, in which two are
 * replaced here: EnumerateMetaCommands, a stub that fails, finds none; and Int64ShaderOps are denied, since vkd3d cannot
 * compile the shaders that have them. D3D12GetInterface, which Wine lacks, tells onnxruntime-genai that there is no other
 * version of Direct3D to choose.
 */
#define COBJMACROS
#define INITGUID
#include <windows.h>

#include <corecrt_startup.h>
#include <d3d12.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef void Object; /* onnxruntime-genai's own types: OgaModel, OgaGenerator, ... */

static HMODULE genai;

static void say(const char *kind, int64_t first, int64_t second) {
  char line[64];
  wsprintfA(line, "%s %d %d", kind, (int)first, (int)second);
  puts(line);
  fflush(stdout);
}

static void fail(const char *step, const char *why) {
  fputs(step, stderr);
  fputs(" failed: ", stderr);
  fputs(why, stderr);
  fputs("\n", stderr);
  exit(1);
}

static FARPROC find(HMODULE module, const char *name) {
  FARPROC function = GetProcAddress(module, name);
  if (!function) fail("looking for a function", name);
  return function;
}

static void require(const char *step, Object *result) {
  if (result) fail(step, ((const char *(*)(Object *))find(genai, "OgaResultGetError"))(result));
}

#define OGA(name, types, ...) require(#name, ((Object * (*)types) find(genai, "Oga" #name))(__VA_ARGS__))

static HRESULT STDMETHODCALLTYPE no_meta_commands(ID3D12Device5 *device, UINT *count, D3D12_META_COMMAND_DESC *found) {
  *count = 0;
  return S_OK;
}

static HRESULT(STDMETHODCALLTYPE *check_feature)(ID3D12Device5 *, D3D12_FEATURE, void *, UINT);

static HRESULT STDMETHODCALLTYPE deny_int64(ID3D12Device5 *device, D3D12_FEATURE feature, void *data, UINT size) {
  HRESULT status = check_feature(device, feature, data, size);
  if (status == S_OK && feature == D3D12_FEATURE_D3D12_OPTIONS1)
    ((D3D12_FEATURE_DATA_D3D12_OPTIONS1 *)data)->Int64ShaderOps = FALSE;
  return status;
}

static HRESULT WINAPI no_interface(REFCLSID class, REFIID id, void **found) {
  *found = NULL;
  return E_NOINTERFACE;
}

static void mend_devices(void) {
  HRESULT(WINAPI * create)(IUnknown *, D3D_FEATURE_LEVEL, REFIID, void **);
  ID3D12Device5 *device = NULL;
  DWORD old;
  create = (void *)find(LoadLibraryA("d3d12.dll"), "D3D12CreateDevice");
  if (create(NULL, D3D_FEATURE_LEVEL_11_0, &IID_ID3D12Device5, (void **)&device) != S_OK)
    fail("creating a Direct3D 12 device", "there is none");
  VirtualProtect(device->lpVtbl, sizeof *device->lpVtbl, PAGE_READWRITE, &old);
  check_feature = device->lpVtbl->CheckFeatureSupport;
  device->lpVtbl->CheckFeatureSupport = deny_int64;
  device->lpVtbl->EnumerateMetaCommands = no_meta_commands;
}

static void replace_import(HMODULE module, const char *name, void *function) {
  char *base = (char *)module;
  IMAGE_NT_HEADERS *headers = (void *)(base + ((IMAGE_DOS_HEADER *)base)->e_lfanew);
  IMAGE_DATA_DIRECTORY *directory = &headers->OptionalHeader.DataDirectory[IMAGE_DIRECTORY_ENTRY_IMPORT];
  IMAGE_IMPORT_DESCRIPTOR *dll = (void *)(base + directory->VirtualAddress);
  for (; dll->Name; dll++) {
    IMAGE_THUNK_DATA *names = (void *)(base + dll->OriginalFirstThunk), *slots = (void *)(base + dll->FirstThunk);
    for (; names->u1.AddressOfData; names++, slots++) {
      IMAGE_IMPORT_BY_NAME *found = (void *)(base + names->u1.AddressOfData);
      DWORD old;
      if (names->u1.Ordinal & IMAGE_ORDINAL_FLAG || strcmp(found->Name, name)) continue;
      VirtualProtect(slots, sizeof *slots, PAGE_READWRITE, &old);
      slots->u1.Function = (ULONG_PTR)function;
    }
  }
}

static void answer(Object *model, const int32_t *head, const int32_t *ids, FILE *output) {
  Object *parameters = NULL, *generator = NULL, *logits = NULL;
  int64_t shape[3];
  int type = 0;
  char *data = NULL;
  OGA(CreateGeneratorParams, (Object *, Object **), model, &parameters);
  OGA(GeneratorParamsSetSearchNumber, (Object *, const char *, double), parameters, "max_length", head[0] + head[2] + 1);
  OGA(CreateGenerator, (Object *, Object *, Object **), model, parameters, &generator);
  OGA(Generator_AppendTokens, (Object *, const int32_t *, size_t), generator, ids, head[0]);
  OGA(Generator_GetOutput, (Object *, const char *, Object **), generator, "logits", &logits);
  OGA(TensorGetType, (Object *, int *), logits, &type);
  OGA(TensorGetShape, (Object *, int64_t *, size_t), logits, shape, 3);
  OGA(TensorGetData, (Object *, void **), logits, (void **)&data);
  size_t row = shape[2] * (type == 1 ? 4 : 2);
  if (fwrite(data + (shape[1] - head[1]) * row, row, head[1], output) != head[1]) fail("writing logits", "disk full?");
  say("logits", type, shape[2]);
  for (int i = 0; i < head[2]; i++) {
    if (((uint8_t(*)(Object *))find(genai, "OgaGenerator_IsDone"))(generator)) break;
    OGA(Generator_GenerateNextToken, (Object *), generator);
    const int32_t *next = NULL; /* the sequence itself does not get the token that ends it */
    size_t count = 0;
    OGA(Generator_GetNextTokens, (Object *, const int32_t **, size_t *), generator, &next, &count);
    say("token", next[0], 0);
  }
  ((void (*)(Object *))find(genai, "OgaDestroyTensor"))(logits);
  ((void (*)(Object *))find(genai, "OgaDestroyGenerator"))(generator);
}

void start(void) {
  Object *model = NULL;
  int32_t head[3];
  _configure_narrow_argv(_crt_argv_unexpanded_arguments);
  if (__argc != 4) fail("starting", "usage: driver MODEL-DIRECTORY PROMPTS LOGITS");
  mend_devices();
  if (!LoadLibraryA("DirectML.dll") || !LoadLibraryA("onnxruntime.dll")) fail("loading", "ONNX Runtime");
  genai = LoadLibraryA("onnxruntime-genai.dll");
  if (!genai) fail("loading", "onnxruntime-genai");
  replace_import(genai, "D3D12GetInterface", no_interface);
  OGA(CreateModel, (const char *, Object **), __argv[1], &model);
  FILE *prompts = fopen(__argv[2], "rb"), *output = fopen(__argv[3], "wb");
  if (!prompts || !output) fail("opening", "the files of prompts and logits");
  while (fread(head, sizeof head, 1, prompts) == 1) {
    int32_t *ids = malloc(head[0] * sizeof *ids);
    if (fread(ids, sizeof *ids, head[0], prompts) != head[0]) fail("reading", "the file of prompts ends early");
    answer(model, head, ids, output);
  }
  fflush(output);
  exit(0);
}
