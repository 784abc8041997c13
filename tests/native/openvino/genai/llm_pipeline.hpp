// What the example in C++ uses of openvino-genai, whose wheel has the library and no headers. The linker checks the names
// and the arguments. The sizes leave room for the members, which only the library touches.

#pragma once

#include <cstddef>
#include <filesystem>
#include <ostream>
#include <string>
#include <variant>
#include <vector>

#include "openvino/runtime/properties.hpp"

namespace ov::genai {

inline constexpr Property<std::size_t> max_new_tokens{"max_new_tokens"};

struct DecodedResults {
    std::vector<std::string> texts;
    alignas(std::max_align_t) std::byte others[4096];
};

inline std::ostream& operator<<(std::ostream& stream, const DecodedResults& results) {
    return stream << results.texts.at(0);
}

class LLMPipeline {
public:
    LLMPipeline(const std::filesystem::path& models_path, const std::string& device, const AnyMap& properties = {});
    ~LLMPipeline();

    template <typename... Properties>
    DecodedResults generate(std::variant<std::string, std::vector<std::string>> inputs, Properties... properties) {
        return generate(inputs, AnyMap{properties...});
    }

    DecodedResults generate(std::variant<std::string, std::vector<std::string>> inputs, const AnyMap& properties);

private:
    alignas(std::max_align_t) std::byte members[4096];
};

}  // namespace ov::genai
