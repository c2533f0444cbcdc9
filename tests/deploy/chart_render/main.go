// Renders the templates of a chart with Go's text/template, which is Helm's engine, and those few functions of Helm
// that the chart uses. It is a stand-in for tests where helm cannot be had, and not helm: no schema, no hooks, no
// capabilities, no subcharts.
//
//	chart_render CHART < context.json
//
// The context holds Values (merged already), Release and Chart. A missing key is an error, which is stricter than helm.
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"sort"
	"strings"
	"text/template"
)

type files map[string]string

func (f files) Get(name string) string { return f[name] }

func (f files) Glob(pattern string) files {
	found := files{}
	for name, text := range f {
		if ok, _ := path.Match(pattern, name); ok {
			found[name] = text
		}
	}
	return found
}

// read collects a folder as helm does: symbolic links are followed, names are those of the links.
func read(root, below string, found files) error {
	entries, err := os.ReadDir(filepath.Join(root, below))
	if err != nil {
		return err
	}
	for _, entry := range entries {
		name := path.Join(below, entry.Name())
		info, err := os.Stat(filepath.Join(root, name))
		if err != nil {
			return err
		}
		if info.IsDir() {
			if err := read(root, name, found); err != nil {
				return err
			}
			continue
		}
		text, err := os.ReadFile(filepath.Join(root, name))
		if err != nil {
			return err
		}
		found[name] = string(text)
	}
	return nil
}

func indent(spaces int, text string) string {
	pad := strings.Repeat(" ", spaces)
	return pad + strings.ReplaceAll(text, "\n", "\n"+pad)
}

// block writes a value as YAML in block style; scalars are written as JSON, which is YAML too.
func block(value any) string {
	var lines []string
	switch typed := value.(type) {
	case map[string]any:
		keys := make([]string, 0, len(typed))
		for key := range typed {
			keys = append(keys, key)
		}
		sort.Strings(keys)
		for _, key := range keys {
			lines = append(lines, fmt.Sprintf("%q:%s", key, nested(typed[key])))
		}
	case []any:
		for _, item := range typed {
			lines = append(lines, "-"+strings.Replace(indent(2, block(item)), "  ", " ", 1))
		}
	}
	if len(lines) > 0 {
		return strings.Join(lines, "\n")
	}
	scalar, err := json.Marshal(value)
	if err != nil {
		panic(err)
	}
	return string(scalar)
}

func nested(value any) string {
	text := block(value)
	switch typed := value.(type) {
	case map[string]any:
		if len(typed) > 0 {
			return "\n" + indent(2, text)
		}
	case []any:
		if len(typed) > 0 {
			return "\n" + indent(2, text)
		}
	}
	return " " + text
}

func render(chart string) error {
	context := map[string]any{}
	if err := json.NewDecoder(os.Stdin).Decode(&context); err != nil {
		return err
	}
	all := files{}
	if err := read(chart, "", all); err != nil {
		return err
	}
	context["Files"] = all
	root := template.New("chart").Option("missingkey=error")
	root.Funcs(template.FuncMap{
		"include": func(name string, data any) (string, error) {
			var out bytes.Buffer
			err := root.ExecuteTemplate(&out, name, data)
			return out.String(), err
		},
		"indent":     indent,
		"nindent":    func(spaces int, text string) string { return "\n" + indent(spaces, text) },
		"toYaml":     block,
		"quote":      func(value any) string { return fmt.Sprintf("%q", fmt.Sprint(value)) },
		"base":       path.Base,
		"trimSuffix": func(suffix, text string) string { return strings.TrimSuffix(text, suffix) },
	})
	var names []string
	for name := range all.Glob("templates/*") {
		if _, err := root.New(name).Parse(all[name]); err != nil {
			return err
		}
		names = append(names, name)
	}
	sort.Strings(names)
	for _, name := range names {
		if strings.HasSuffix(name, ".tpl") || strings.HasSuffix(name, ".txt") {
			continue
		}
		fmt.Printf("---\n# Source: %s\n", name)
		if err := root.ExecuteTemplate(os.Stdout, name, context); err != nil {
			return err
		}
		fmt.Println()
	}
	return nil
}

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: chart_render CHART < context.json")
		os.Exit(2)
	}
	if err := render(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "chart_render:", err)
		os.Exit(1)
	}
}
