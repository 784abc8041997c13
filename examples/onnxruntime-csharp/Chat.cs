// Answer a question with an artifact on ONNX Runtime GenAI: `Chat DIRECTORY QUESTION`. `phi3 pull` prints the directory.

using System;
using System.Web;
using Microsoft.ML.OnnxRuntimeGenAI;

static class Chat
{
    static int Main(string[] arguments)
    {
        if (arguments.Length != 2)
        {
            Console.Error.WriteLine("usage: Chat DIRECTORY QUESTION");
            return 2;
        }
        var question = HttpUtility.JavaScriptStringEncode(arguments[1], addDoubleQuotes: true);
        var messages = "[{\"role\": \"user\", \"content\": " + question + "}]";
        using (var model = new Model(arguments[0]))
        using (var tokenizer = new Tokenizer(model))
        using (var tokens = tokenizer.Encode(tokenizer.ApplyChatTemplate("", messages, "", true)))
        using (var parameters = new GeneratorParams(model))
        {
            parameters.SetSearchOption("max_length", tokens[0].Length + 256);
            using (var generator = new Generator(model, parameters))
            using (var stream = tokenizer.CreateStream())
            {
                generator.AppendTokenSequences(tokens);
                while (!generator.IsDone())
                {
                    generator.GenerateNextToken();
                    Console.Write(stream.Decode(generator.GetNextTokens()[0]));
                }
                Console.WriteLine();
            }
        }
        return 0;
    }
}
