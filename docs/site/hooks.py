"""What mkdocs asks for while it builds: pages from outside docs/, generated parts, links."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from site_parts import pages
from site_parts.parts import PARTS

ROOT = Path(__file__).parents[2]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages whose source lies elsewhere in the repository."""
    for page, source in pages.ELSEWHERE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill the page's generated parts, and let its links lead to pages of the site."""
    return pages.relinked(pages.filled(markdown, PARTS), page.file.src_uri)
