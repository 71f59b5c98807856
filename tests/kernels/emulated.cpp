// Calls one function of a kernel's shared library with arguments that lie in a file, and writes the file back.
//
// usage: emulated LIBRARY FUNCTION FILE. The file holds regions of memory that point into each other, all numbers int64:
//   n_regions, n_pointers, the bytes of each region,
//   for each pointer: region, offset in it, region it points to, offset there,
//   the regions one after the other; the first is the function's argument.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

static void must(bool fine, const char* what) {
  if (fine) return;
  std::fprintf(stderr, "%s\n", what);
  std::exit(1);
}

int main(int n, char** arguments) {
  must(n == 4, "usage: emulated LIBRARY FUNCTION FILE");
  void* library = dlopen(arguments[1], RTLD_NOW);
  must(library, dlerror());
  auto function = (void (*)(void*))dlsym(library, arguments[2]);
  must(function, dlerror());

  std::FILE* file = std::fopen(arguments[3], "r+b");
  must(file, "the file cannot be opened");
  auto numbers = [&](size_t count) {
    std::vector<int64_t> read(count);
    must(std::fread(read.data(), 8, count, file) == count, "the file ends early");
    return read;
  };
  const auto counts = numbers(2), sizes = numbers(counts[0]), pointers = numbers(4 * counts[1]);
  const long start = std::ftell(file);
  std::vector<char*> regions;
  for (int64_t size : sizes) {
    // As far apart as they like, so that what is read or written beyond one is in no other.
    regions.push_back((char*)std::aligned_alloc(64, (size + 127) / 64 * 64));
    must(std::fread(regions.back(), 1, size, file) == (size_t)size, "the file ends early");
  }
  for (size_t i = 0; i < pointers.size(); i += 4) {
    char* target = regions[pointers[i + 2]] + pointers[i + 3];
    std::memcpy(regions[pointers[i]] + pointers[i + 1], &target, 8);
  }
  function(regions[0]);
  std::fseek(file, start, SEEK_SET);
  for (size_t i = 0; i < sizes.size(); ++i)
    must(std::fwrite(regions[i], 1, sizes[i], file) == (size_t)sizes[i], "the results cannot be written");
  must(std::fclose(file) == 0, "the results cannot be written");
}
