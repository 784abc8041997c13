// Answer a question with an artifact on OpenVINO GenAI: `chat DIRECTORY QUESTION`. `phi3 pull` prints the directory.

#include <iostream>

#include "openvino/genai/llm_pipeline.hpp"

int main(int argc, char* argv[]) {
    if (argc != 3) {
        std::cerr << "usage: chat DIRECTORY QUESTION\n";
        return 2;
    }
    ov::genai::LLMPipeline pipeline(argv[1], "CPU");  // or "GPU"
    std::cout << pipeline.generate(argv[2], ov::genai::max_new_tokens(256)) << '\n';
}
