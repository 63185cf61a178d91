// A libnvrtc for tests: it compiles nothing, since the tests' libcuda has the kernels already.

#include <cstring>

using Result = int;

namespace {

const char PTX[] = "// the kernels of the tests' libcuda\n";
char program_handle;

} // namespace

extern "C" {

Result nvrtcCreateProgram(void** program, const char*, const char*, int, const char* const*, const char* const*) {
    *program = &program_handle;
    return 0;
}

Result nvrtcDestroyProgram(void**) { return 0; }
Result nvrtcCompileProgram(void*, int, const char* const*) { return 0; }

Result nvrtcGetPTXSize(void*, size_t* bytes) {
    *bytes = sizeof PTX;
    return 0;
}

Result nvrtcGetPTX(void*, char* text) {
    std::memcpy(text, PTX, sizeof PTX);
    return 0;
}

Result nvrtcGetProgramLogSize(void*, size_t* bytes) {
    *bytes = 1;
    return 0;
}

Result nvrtcGetProgramLog(void*, char* text) {
    *text = 0;
    return 0;
}

} // extern "C"
