// The part of libtorch's stable C interface that arc_ao calls, declared here so that the library
// builds with a C++ compiler alone and one binary serves every torch from 2.11 on.
//
// The declarations restate torch/csrc/inductor/aoti_torch/c/shim.h and torch/csrc/stable/c/shim.h;
// tests/test_native_build.py compiles both together, so that a difference is a compile error.
#pragma once

#include <cstddef>
#include <cstdint>

struct AtenTensorOpaque;
using AtenTensorHandle = AtenTensorOpaque*;
struct TorchLibraryOpaque;
using TorchLibraryHandle = TorchLibraryOpaque*;
struct StringOpaque;
using StringHandle = StringOpaque*;
using AOTITorchError = int32_t;
using StableIValue = uint64_t;
typedef void (*ParallelFunc)(int64_t begin, int64_t end, void* context);

extern "C" {
int32_t aoti_torch_dtype_bfloat16();
int32_t aoti_torch_dtype_float16();
int32_t aoti_torch_dtype_float32();
int32_t aoti_torch_dtype_uint8();
int32_t aoti_torch_dtype_int32();
int32_t aoti_torch_device_type_cpu();
int32_t aoti_torch_layout_strided();

AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle tensor);
AOTITorchError aoti_torch_get_data_ptr(AtenTensorHandle tensor, void** data);
AOTITorchError aoti_torch_get_dim(AtenTensorHandle tensor, int64_t* dim);
AOTITorchError aoti_torch_get_sizes(AtenTensorHandle tensor, int64_t** sizes);
AOTITorchError aoti_torch_get_strides(AtenTensorHandle tensor, int64_t** strides);
AOTITorchError aoti_torch_get_dtype(AtenTensorHandle tensor, int32_t* dtype);
AOTITorchError aoti_torch_get_device_type(AtenTensorHandle tensor, int32_t* device_type);
AOTITorchError aoti_torch_get_layout(AtenTensorHandle tensor, int32_t* layout);
AOTITorchError aoti_torch_get_storage_size(AtenTensorHandle tensor, int64_t* bytes);
AOTITorchError aoti_torch_get_storage_offset(AtenTensorHandle tensor, int64_t* offset);
AOTITorchError aoti_torch_empty_strided(
    int64_t dim,
    const int64_t* sizes,
    const int64_t* strides,
    int32_t dtype,
    int32_t device_type,
    int32_t device_index,
    AtenTensorHandle* tensor);

AOTITorchError aoti_torch_library_init_impl(
    const char* ns, const char* key, const char* file, uint32_t line, TorchLibraryHandle* library);
AOTITorchError aoti_torch_library_init_fragment(
    const char* ns, const char* file, uint32_t line, TorchLibraryHandle* library);
AOTITorchError aoti_torch_library_def(TorchLibraryHandle library, const char* schema);
AOTITorchError torch_library_impl(
    TorchLibraryHandle library,
    const char* name,
    void (*fn)(StableIValue* stack, uint64_t num_args, uint64_t num_outputs),
    uint64_t extension_build_version);

AOTITorchError torch_call_dispatcher(
    const char* name, const char* overload, StableIValue* stack, uint64_t extension_build_version);
int32_t aoti_torch_memory_format_contiguous_format();

AOTITorchError torch_parallel_for(
    int64_t begin, int64_t end, int64_t grain_size, ParallelFunc fn, void* context);
AOTITorchError torch_get_num_threads(uint32_t* num_threads);

AOTITorchError torch_delete_string(StringHandle handle);
AOTITorchError torch_string_length(StringHandle handle, size_t* length);
AOTITorchError torch_string_c_str(StringHandle handle, const char** data);

// What the last call that failed said; null before torch 2.13.
__attribute__((weak)) const char* torch_exception_get_what_without_backtrace();
}
