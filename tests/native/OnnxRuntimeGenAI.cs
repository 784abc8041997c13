// What the example in C# uses of the NuGet package Microsoft.ML.OnnxRuntimeGenAI, on the C API of the library in the wheel.

using System;
using System.Runtime.InteropServices;

namespace Microsoft.ML.OnnxRuntimeGenAI
{
    static class Native
    {
        const string Library = "onnxruntime-genai";

        [DllImport(Library)] public static extern IntPtr OgaResultGetError(IntPtr result);
        [DllImport(Library)] public static extern IntPtr OgaCreateModel(string path, out IntPtr model);
        [DllImport(Library)] public static extern void OgaDestroyModel(IntPtr model);
        [DllImport(Library)] public static extern IntPtr OgaCreateTokenizer(IntPtr model, out IntPtr tokenizer);
        [DllImport(Library)] public static extern void OgaDestroyTokenizer(IntPtr tokenizer);
        [DllImport(Library)] public static extern IntPtr OgaTokenizerApplyChatTemplate(
            IntPtr tokenizer, string template, string messages, string tools,
            [MarshalAs(UnmanagedType.I1)] bool addGenerationPrompt, out IntPtr text);
        [DllImport(Library)] public static extern IntPtr OgaCreateSequences(out IntPtr sequences);
        [DllImport(Library)] public static extern void OgaDestroySequences(IntPtr sequences);
        [DllImport(Library)] public static extern UIntPtr OgaSequencesGetSequenceCount(IntPtr sequences, UIntPtr index);
        [DllImport(Library)] public static extern IntPtr OgaSequencesGetSequenceData(IntPtr sequences, UIntPtr index);
        [DllImport(Library)] public static extern IntPtr OgaTokenizerEncode(IntPtr tokenizer, string text, IntPtr sequences);
        [DllImport(Library)] public static extern IntPtr OgaCreateTokenizerStream(IntPtr tokenizer, out IntPtr stream);
        [DllImport(Library)] public static extern void OgaDestroyTokenizerStream(IntPtr stream);
        [DllImport(Library)] public static extern IntPtr OgaTokenizerStreamDecode(IntPtr stream, int token, out IntPtr text);
        [DllImport(Library)] public static extern IntPtr OgaCreateGeneratorParams(IntPtr model, out IntPtr parameters);
        [DllImport(Library)] public static extern void OgaDestroyGeneratorParams(IntPtr parameters);
        [DllImport(Library)] public static extern IntPtr OgaGeneratorParamsSetSearchNumber(
            IntPtr parameters, string name, double value);
        [DllImport(Library)] public static extern IntPtr OgaCreateGenerator(
            IntPtr model, IntPtr parameters, out IntPtr generator);
        [DllImport(Library)] public static extern void OgaDestroyGenerator(IntPtr generator);
        [DllImport(Library)] [return: MarshalAs(UnmanagedType.I1)] public static extern bool OgaGenerator_IsDone(
            IntPtr generator);
        [DllImport(Library)] public static extern IntPtr OgaGenerator_AppendTokenSequences(
            IntPtr generator, IntPtr sequences);
        [DllImport(Library)] public static extern IntPtr OgaGenerator_GenerateNextToken(IntPtr generator);
        [DllImport(Library)] public static extern IntPtr OgaGenerator_GetNextTokens(
            IntPtr generator, out IntPtr tokens, out UIntPtr count);

        public static void Check(IntPtr result)
        {
            if (result != IntPtr.Zero)
            {
                throw new Exception(Marshal.PtrToStringAnsi(OgaResultGetError(result)));
            }
        }

        public static int[] Tokens(IntPtr tokens, UIntPtr count)
        {
            var copy = new int[(int)count];
            Marshal.Copy(tokens, copy, 0, copy.Length);
            return copy;
        }
    }

    public abstract class Owner : IDisposable
    {
        readonly Action<IntPtr> destroy;
        internal readonly IntPtr Handle;

        internal Owner(IntPtr handle, Action<IntPtr> destroy)
        {
            Handle = handle;
            this.destroy = destroy;
        }

        internal delegate IntPtr Creator(out IntPtr handle);

        internal static IntPtr Create(Creator creator)
        {
            Native.Check(creator(out IntPtr handle));
            return handle;
        }

        public void Dispose() { destroy(Handle); }
    }

    public class Model : Owner
    {
        public Model(string path)
            : base(Create((out IntPtr handle) => Native.OgaCreateModel(path, out handle)), Native.OgaDestroyModel) { }
    }

    public class Sequences : Owner
    {
        internal Sequences() : base(Create(Native.OgaCreateSequences), Native.OgaDestroySequences) { }

        public int[] this[ulong index]
        {
            get
            {
                var data = Native.OgaSequencesGetSequenceData(Handle, (UIntPtr)index);
                return Native.Tokens(data, Native.OgaSequencesGetSequenceCount(Handle, (UIntPtr)index));
            }
        }
    }

    public class Tokenizer : Owner
    {
        public Tokenizer(Model model)
            : base(
                Create((out IntPtr handle) => Native.OgaCreateTokenizer(model.Handle, out handle)),
                Native.OgaDestroyTokenizer) { }

        public string ApplyChatTemplate(string template, string messages, string tools, bool addGenerationPrompt)
        {
            return Marshal.PtrToStringAnsi(Create((out IntPtr text) => Native.OgaTokenizerApplyChatTemplate(
                Handle, template, messages, tools, addGenerationPrompt, out text)));
        }

        public Sequences Encode(string text)
        {
            var sequences = new Sequences();
            Native.Check(Native.OgaTokenizerEncode(Handle, text, sequences.Handle));
            return sequences;
        }

        public TokenizerStream CreateStream() { return new TokenizerStream(this); }
    }

    public class TokenizerStream : Owner
    {
        internal TokenizerStream(Tokenizer tokenizer)
            : base(
                Create((out IntPtr handle) => Native.OgaCreateTokenizerStream(tokenizer.Handle, out handle)),
                Native.OgaDestroyTokenizerStream) { }

        public string Decode(int token)
        {
            return Marshal.PtrToStringAnsi(
                Create((out IntPtr text) => Native.OgaTokenizerStreamDecode(Handle, token, out text)));
        }
    }

    public class GeneratorParams : Owner
    {
        public GeneratorParams(Model model)
            : base(
                Create((out IntPtr handle) => Native.OgaCreateGeneratorParams(model.Handle, out handle)),
                Native.OgaDestroyGeneratorParams) { }

        public void SetSearchOption(string name, double value)
        {
            Native.Check(Native.OgaGeneratorParamsSetSearchNumber(Handle, name, value));
        }
    }

    public class Generator : Owner
    {
        public Generator(Model model, GeneratorParams parameters)
            : base(
                Create((out IntPtr handle) => Native.OgaCreateGenerator(model.Handle, parameters.Handle, out handle)),
                Native.OgaDestroyGenerator) { }

        public bool IsDone() { return Native.OgaGenerator_IsDone(Handle); }

        public void AppendTokenSequences(Sequences sequences)
        {
            Native.Check(Native.OgaGenerator_AppendTokenSequences(Handle, sequences.Handle));
        }

        public void GenerateNextToken() { Native.Check(Native.OgaGenerator_GenerateNextToken(Handle)); }

        public int[] GetNextTokens()
        {
            Native.Check(Native.OgaGenerator_GetNextTokens(Handle, out IntPtr tokens, out UIntPtr count));
            return Native.Tokens(tokens, count);
        }
    }
}
